"""Heads that cannot be sampled: refused with a remedy, and computed whole by exact distillation."""

import peft
import pytest
import torch.distributed as dist
from head_cases import REFUSED, C
from tiny_models import labelled_tokens, llama, patched_modules, tokens

from hf_dis.head.check import check_head
from hf_dis.head.switch import SampledHead
from hf_dis.models.head_search import find_head_layers


@pytest.fixture
def one_process():
    """A process group, for a mesh of one device."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sampled_is_refused_with_what_to_do(case, one_process):
    build, message = REFUSED[case]
    model = build()
    with pytest.raises(ValueError, match=message):
        check_head(model, SampledHead(model, find_head_layers(model, C)), tokens(2, C))
    assert patched_modules(model) == []


EXACT_TAKES = [
    "ESM",
    "FSMT",
    "DoRA on the head",
    "another adapter on the head",
    "trainable_token_indices, a tied head",
]


@pytest.mark.parametrize("case", EXACT_TAKES)
def test_computing_every_class_takes_what_cannot_be_sampled(case, make_trainer):
    """As the messages say; sampled, each is refused before or at the first step."""
    build, message = REFUSED[case]
    given = {"teacher": build(), "train_dataset": labelled_tokens(8, C), "max_steps": 1}
    with pytest.raises(ValueError, match=message):
        make_trainer(build(), **given).train()
    make_trainer(build(), head_mode="exact", **given).train()


def test_prompt_learning_is_refused_by_every_mode(make_trainer):
    build, _ = REFUSED["prompt learning"]
    given = {"teacher": llama(C), "train_dataset": labelled_tokens(8, C), "max_steps": 1}
    with pytest.raises(ValueError, match=r"logits of \(8, 8\) tokens for the \(8, 6\).*use LoRA"):
        make_trainer(build(), head_mode="exact", **given).train()


def test_trainable_token_indices_leave_an_untied_head_alone():
    model = peft.get_peft_model(llama(C), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    check_head(model, SampledHead(model, find_head_layers(model, C)), tokens(2, C))
