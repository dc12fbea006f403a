"""Names and digests: the same for the same model wherever its values are kept, and another for another."""

import copy

import accelerate
import pytest
import torch
import transformers as hf
from tiny_models import bart, bert_mlm, gpt2, llama, resnet, vit
from tokenizers import Tokenizer, models
from torch import nn

from hf_dis.models.provenance import known_as, labels_digest, stored_values, tokenizer_digest, weights_digest

BUILDS = {"ViT": vit, "ResNet": resnet, "Llama": llama, "GPT-2, tied": gpt2, "BERT, tied": bert_mlm, "Bart": bart}
CPU = torch.device("cpu")


def on_cpu(model, folder):
    return accelerate.cpu_offload(model, CPU)


def with_buffers(model, folder):
    return accelerate.cpu_offload(model, CPU, offload_buffers=True)


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, CPU)


def in_part(model, folder):
    """As ``device_map`` leaves a model: one part offloaded, the rest as it is."""
    parts = [name for name, _ in (*model.named_children(), *model.named_buffers(recurse=False))]
    places = {name: "disk" if place == 0 else "cpu" for place, name in enumerate(parts)}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADED = [on_cpu, with_buffers, on_disk, in_part]


@pytest.mark.parametrize("offload", OFFLOADED)
@pytest.mark.parametrize("name", BUILDS)
def test_offloaded_values_are_those_of_the_model_in_memory(name, offload, tmp_path):
    build = BUILDS[name]
    plain, offloaded = build(11).bfloat16(), offload(build(11).bfloat16(), str(tmp_path))
    assert any(value.is_meta for value in offloaded.state_dict().values())
    found = dict(stored_values(offloaded))
    assert found.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(found[key], value) and not found[key].requires_grad, key
    assert weights_digest(offloaded) == weights_digest(plain) != weights_digest(build(11, seed=1).bfloat16())


def test_values_out_of_reach_stand_for_their_shapes():
    with torch.device("meta"):
        one, other = nn.Linear(3, 4), nn.Linear(3, 5)
    assert weights_digest(one) == weights_digest(one) != weights_digest(other)
    assert all(value.is_meta for _, value in stored_values(one))


def test_a_digest_tells_names_types_and_values():
    linear = nn.Linear(3, 4)
    others = nn.Sequential(linear), nn.Linear(3, 4), copy.deepcopy(linear).bfloat16()
    assert len({weights_digest(model) for model in (linear, *others)}) == 4


def test_the_name_of_a_model(tmp_path):
    assert known_as(nn.Linear(3, 4)) == known_as(vit(11)) == (None, None)
    vit(11).save_pretrained(tmp_path / "teacher")
    found = hf.ViTForImageClassification.from_pretrained(tmp_path / "teacher")
    assert known_as(found) == ("teacher (a local directory)", None)


def test_the_names_of_classes():
    assert labels_digest(nn.Linear(3, 4)) is labels_digest(vit(2)) is None
    first, second = vit(2), vit(2)
    first.config.id2label, second.config.id2label = {0: "cat", 1: "dog"}, {0: "dog", 1: "cat"}
    assert labels_digest(first) != labels_digest(second) and len(labels_digest(first)) == 64


def test_the_tokens_of_a_tokenizer():
    def made(*tokens):
        words = models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=tokens[0])
        return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))

    assert tokenizer_digest(made("a", "b")) == tokenizer_digest(made("a", "b")) != tokenizer_digest(made("b", "a"))
