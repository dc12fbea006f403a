"""Every kind of head in docs/heads.md: sampled classes computed as the full head does, or refused with what to do."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import transformers as hf
from tiny_models import (
    FAMILIES,
    NO_DROPOUT,
    SMALL,
    bart,
    bert_mlm,
    bert_sequences,
    bert_tokens,
    gpt2,
    gpt2_sequences,
    images,
    labelled_tokens,
    llama,
    llama_sequences,
    patched_modules,
    spread_out,
    t5,
    tokens,
    vit,
)
from torch import Tensor, nn

from hf_dis.head.check import check_head
from hf_dis.head.switch import SampledHead
from hf_dis.models.head_search import find_head_layers

C, N, LENGTH = 23, 3, 6
SHARED_IDS = torch.tensor([[0, 5, 9, 22]])
TAILS = torch.tensor([[0, 5, 9, 22], [1, 5, 6, 7]])
POSITIONS = torch.tensor([0, 3, 4, 7, 10, 12, 16])  # among the N x LENGTH tokens
TABLE = Path(__file__).parents[2] / "docs" / "heads.md"


def drawn_ids(num_items: int) -> Tensor:
    """Five classes of each item, one of them twice."""
    ids = torch.randint(C, (num_items, 5), generator=torch.Generator().manual_seed(1))
    ids[:, 1] = ids[:, 0]
    return ids


@dataclass(frozen=True)
class Case:
    """A kind of model, what it is given, and whether its items are tokens."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]] = lambda: tokens(N, C, LENGTH)
    has_token_items: bool = True
    is_tied: bool = False

    def prepared(self) -> tuple[nn.Module, SampledHead, dict[str, Tensor], Tensor | None]:
        """The model in float64, in training mode, its head, inputs, and the positions of its items."""
        model = self.build().double().train()
        inputs = {
            name: value.double() if value.is_floating_point() else value for name, value in self.inputs().items()
        }
        positions = POSITIONS if self.has_token_items else None
        return model, SampledHead(model, find_head_layers(model, C)), inputs, positions


def small(kind: str, config: str, spread: float = 10.0, **settings) -> Callable[[], nn.Module]:
    """Builds a class of transformers, by name, from a configuration."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return spread_out(getattr(hf, kind)(getattr(hf, config)(**settings)), spread)

    return build


def seq2seq_inputs() -> dict[str, Tensor]:
    inputs = tokens(N, C, LENGTH)
    return {**inputs, "decoder_input_ids": tokens(N, C, LENGTH, seed=1)["input_ids"]}


def with_adapter(build: Callable[[], nn.Module], **config) -> Callable[[], nn.Module]:
    """A model with a LoRA adapter that has been trained: PEFT starts it as zero."""

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        model = peft.get_peft_model(build(), peft.LoraConfig(r=2, lora_alpha=3, lora_dropout=0.2, **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.5)
        return model

    return adapted


def image_case(family: str) -> Case:
    build, size = FAMILIES[family]
    return Case(lambda: spread_out(build(C), 10), lambda: {"pixel_values": images(N, size)}, has_token_items=False)


def pooled(build: Callable[[], nn.Module], vocab_size: int = 50) -> Case:
    return Case(build, lambda: tokens(N, vocab_size, LENGTH), has_token_items=False)


TEXT = {"vocab_size": C, "pad_token_id": 0, **SMALL}
MASKED = {**TEXT, **NO_DROPOUT}
DISTILBERT = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
DISTILBERT |= {"pad_token_id": 0, "seq_classif_dropout": 0.0}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0, "pad_token_id": 0, "vocab_size": C}
SEQ2SEQ |= {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
SEQ2SEQ |= {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
SEQ2SEQ |= {"decoder_start_token_id": 1, "eos_token_id": 2}
LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
SWIFTFORMER = {"embed_dims": [8, 16], "depths": [1, 1], "downsamples": [True, True], "drop_path_rate": 0.0}


def with_logits_bias(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def filled() -> nn.Module:
        model = build()
        model.final_logits_bias.copy_(torch.linspace(-1, 1, C))
        return model

    return filled


def bias_case(kind: str, config: str, **settings) -> Case:
    return Case(with_logits_bias(small(kind, config, **SEQ2SEQ, **settings)), seq2seq_inputs, is_tied=True)


SAMPLED = {
    **{family: image_case(family) for family in FAMILIES},
    "DeiT, two heads": Case(
        small(
            "DeiTForImageClassificationWithTeacher", "DeiTConfig", image_size=8, patch_size=4, num_labels=C, **SMALL
        ),
        lambda: {"pixel_values": images(N)},
        has_token_items=False,
    ),
    "LeViT, two heads": Case(
        small("LevitForImageClassificationWithTeacher", "LevitConfig", image_size=64, num_labels=C, **LEVIT),
        lambda: {"pixel_values": images(N, 64)},
        has_token_items=False,
    ),
    "SwiftFormer, two heads": Case(
        small("SwiftFormerForImageClassification", "SwiftFormerConfig", num_labels=C, **SWIFTFORMER),
        lambda: {"pixel_values": images(N, 64)},
        has_token_items=False,
    ),
    "BERT, sequences": pooled(lambda: bert_sequences(C, spread=10)),
    "RoBERTa, sequences": pooled(
        small("RobertaForSequenceClassification", "RobertaConfig", num_labels=C, **{**MASKED, "vocab_size": 50})
    ),
    "DistilBERT, sequences": pooled(
        small("DistilBertForSequenceClassification", "DistilBertConfig", num_labels=C, vocab_size=50, **DISTILBERT)
    ),
    "GPT-2, sequences": pooled(lambda: gpt2_sequences(C, spread=10)),
    "Llama, sequences": pooled(lambda: llama_sequences(C, spread=10)),
    "BERT, tokens": Case(lambda: bert_tokens(C, spread=10)),
    "BERT, masked": Case(lambda: bert_mlm(C, spread=10), is_tied=True),
    "RoBERTa, masked": Case(small("RobertaForMaskedLM", "RobertaConfig", **MASKED), is_tied=True),
    "DistilBERT, masked": Case(
        small("DistilBertForMaskedLM", "DistilBertConfig", vocab_size=C, **DISTILBERT), is_tied=True
    ),
    "ALBERT, masked": Case(small("AlbertForMaskedLM", "AlbertConfig", embedding_size=8, **MASKED), is_tied=True),
    "ELECTRA, masked": Case(small("ElectraForMaskedLM", "ElectraConfig", embedding_size=8, **MASKED), is_tied=True),
    "DeBERTa, masked": Case(small("DebertaV2ForMaskedLM", "DebertaV2Config", **MASKED), is_tied=True),
    "ModernBERT, masked": Case(small("ModernBertForMaskedLM", "ModernBertConfig", **TEXT), is_tied=True),
    "Llama": Case(lambda: llama(C, spread=10)),
    "GPT-2": Case(lambda: gpt2(C, spread=10), is_tied=True),
    "Gemma-2, soft-capped": Case(
        small("Gemma2ForCausalLM", "Gemma2Config", final_logit_softcapping=2.0, **DECODER), is_tied=True
    ),
    "Granite, scaled": Case(small("GraniteForCausalLM", "GraniteConfig", logits_scaling=3.0, **DECODER)),
    "Cohere, scaled": Case(small("CohereForCausalLM", "CohereConfig", logit_scale=0.5, **DECODER), is_tied=True),
    "T5": Case(lambda: t5(C, spread=10), seq2seq_inputs, is_tied=True),
    "BART": Case(lambda: bart(C, spread=10), seq2seq_inputs, is_tied=True),
    "mBART": bias_case("MBartForConditionalGeneration", "MBartConfig"),
    "Marian": bias_case("MarianMTModel", "MarianConfig"),
    "Pegasus": bias_case("PegasusForConditionalGeneration", "PegasusConfig"),
    "LoRA on the body": Case(with_adapter(lambda: llama(C, spread=10), target_modules=["q_proj"])),
    "LoRA on the body, a tied head": Case(
        with_adapter(lambda: gpt2(C, spread=10), target_modules=["c_attn"], fan_in_fan_out=True), is_tied=True
    ),
    "modules_to_save": Case(
        with_adapter(lambda: llama(C, spread=10), target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "modules_to_save, sequences": pooled(
        with_adapter(lambda: llama_sequences(C, spread=10), target_modules=["q_proj"], task_type="SEQ_CLS")
    ),
    "modules_to_save, images": Case(
        with_adapter(lambda: vit(C, spread=10), target_modules=["q_proj"], modules_to_save=["classifier"]),
        lambda: {"pixel_values": images(N)},
        has_token_items=False,
    ),
    "LoRA on the head": Case(with_adapter(lambda: llama(C, spread=10), target_modules=["q_proj", "lm_head"])),
    "LoRA on a head with a bias": pooled(
        with_adapter(lambda: bert_sequences(C, spread=10), target_modules=["query", "classifier"])
    ),
    "LoRA on a tied head": Case(
        with_adapter(lambda: t5(C, spread=10), target_modules=["q", "lm_head"]), seq2seq_inputs, is_tied=True
    ),
    "LoRA on BART's head": Case(
        with_adapter(lambda: bart(C, spread=10), target_modules=["q_proj", "lm_head"]), seq2seq_inputs, is_tied=True
    ),
}


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of some function of the logits that treats no two of them alike."""
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    model.zero_grad()
    (weights * logits.log_softmax(1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def full_and_drawn(model, head, inputs, positions, item_ids, tail_ids):
    """Logits at the sampled classes and gradients, of the full head and of the switched one, with the same dropout."""
    torch.manual_seed(2)
    full = model(**inputs).logits
    full = full if positions is None else full.flatten(0, 1)[positions]
    full = full.gather(1, torch.cat([item_ids, tail_ids(tail_ids, len(item_ids))], 1))
    expected = gradients(model, full)
    torch.manual_seed(2)
    with head.only(item_ids, tail_ids, positions):
        sampled = model(**inputs).logits
        found = gradients(model, sampled)
    return full, expected, sampled, found


@pytest.mark.parametrize(
    "tail_ids", [SHARED_IDS, TAILS, SHARED_IDS[:, :0]], ids=["two strata", "several tails", "per item"]
)
@pytest.mark.parametrize("case", SAMPLED)
def test_drawn_classes_are_computed_as_by_the_full_head(case, tail_ids):
    """Logits and every gradient of the model, in training mode, float64 to 1e-10 of the whole gradient's norm."""
    model, head, inputs, positions = SAMPLED[case].prepared()
    item_ids = drawn_ids(N if positions is None else len(positions))
    full, expected, sampled, found = full_and_drawn(model, head, inputs, positions, item_ids, tail_ids)
    torch.testing.assert_close(sampled, full, rtol=1e-10, atol=1e-10)
    assert full.std() > 0.01 and found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all((found[name] - expected[name]).norm() <= 1e-10 * whole for name in expected)


@pytest.mark.parametrize("case", [name for name, case in SAMPLED.items() if not case.is_tied])
def test_row_sparse_gradients_are_those_of_the_full_head_in_the_drawn_rows(case):
    model, head, inputs, positions = SAMPLED[case].prepared()
    item_ids = drawn_ids(N if positions is None else len(positions))
    sparse = SampledHead(model, list(head.layers), row_sparse=True)
    _, expected, _, found = full_and_drawn(model, sparse, inputs, positions, item_ids, SHARED_IDS)
    in_top = {id(parameter) for parameter in head.parameters()}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in in_top}
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in found.items():
        assert gradient.is_sparse == (name in names)
        assert ((gradient.to_dense() if gradient.is_sparse else gradient) - expected[name]).norm() <= 1e-10 * whole


@pytest.mark.parametrize("case", SAMPLED)
def test_each_passes_its_check_and_is_left_as_it_was(case):
    model, head, inputs, positions = SAMPLED[case].prepared()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    check_head(model, head, inputs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and patched_modules(model) == []
    with head.only(drawn_ids(N if positions is None else len(positions)), SHARED_IDS, positions):
        model(**inputs)
        assert list(model.state_dict()) == list(state) and len(patched_modules(model)) == len(head.layers)
    assert patched_modules(model) == [] and not any("final_logits_bias" in vars(module) for module in model.modules())
    model.eval()
    assert model(**inputs).logits.shape[-1] == C


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", [gpt2_sequences, llama_sequences])
def test_a_head_before_the_pooling_answers_at_the_last_token_of_each_sequence(build, side):
    """Token 0 is the padding: sequences of 6, 3 and 1 tokens."""
    model = build(C, spread=10).double()
    ids = tokens(N, 50, LENGTH)["input_ids"].clamp_min(3)
    mask = torch.tensor([[1] * LENGTH, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    mask = mask.flip(1) if side == "left" else mask
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    head = SampledHead(model, find_head_layers(model, C))
    full, expected, sampled, found = full_and_drawn(model, head, inputs, None, drawn_ids(N), TAILS)
    torch.testing.assert_close(sampled, full, rtol=1e-10, atol=1e-10)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10)


# Refused


class Packed(nn.Parameter):
    """A parameter of a type of its own, as bitsandbytes and torchao put in the place of a head's."""


def with_weight(make: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = llama(C)
        model.lm_head._parameters["weight"] = make(model.lm_head.weight.detach())
        return model

    return build


def tensor_parallel(weight: Tensor) -> Tensor:
    """A head's weight as ``tp_plan`` leaves it, over one process."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    return nn.Parameter(dist.tensor.distribute_tensor(weight, mesh, [dist.tensor.Shard(0)]))


def merged() -> nn.Module:
    model = with_adapter(lambda: llama(C), target_modules=["lm_head"])()
    model.merge_adapter()
    return model


def esm() -> nn.Module:
    settings = {"position_embedding_type": "rotary", "mask_token_id": 4, **MASKED}
    return small("EsmForMaskedLM", "EsmConfig", **settings)()


def fsmt() -> nn.Module:
    vocabulary = {"src_vocab_size": C, "tgt_vocab_size": C, "langs": ["en", "de"]}
    return small("FSMTForConditionalGeneration", "FSMTConfig", 1.0, **SEQ2SEQ, **vocabulary)()


def adapted(config: peft.PeftConfig, build: Callable[[int], nn.Module] = llama) -> Callable[[], nn.Module]:
    return lambda: peft.get_peft_model(build(C), config)


REFUSED = {
    "ESM": (esm, r"'lm_head.decoder' at sampled classes .*must match.*head_mode='exact'"),
    "FSMT": (fsmt, r"'model.decoder.embed_tokens' is a torch.nn.modules.sparse.Embedding.*has to be an nn.Linear"),
    "8-bit": (
        with_weight(lambda weight: nn.Parameter(weight.to(torch.int8), requires_grad=False)),
        r"'lm_head' is a Parameter of torch.int8.*llm_int8_skip_modules",
    ),
    "4-bit": (with_weight(Packed), r"'lm_head' is a Packed of torch.float32.*llm_int8_skip_modules"),
    "tensor-parallel": (with_weight(tensor_parallel), r"'lm_head' is a DTensor.*no tp_plan"),
    "DoRA on the head": (
        adapted(peft.LoraConfig(target_modules=["lm_head"], use_dora=True)),
        r"of the output head 'base_model.model.lm_head' is not a plain LoRA \(Dora.*use_dora=False",
    ),
    "another adapter on the head": (
        adapted(peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])),
        r"'base_model.model.lm_head' is a peft.tuners.ia3.layer.Linear.*other adapters",
    ),
    "merged adapters": (merged, r"'base_model.model.lm_head' are merged.*unmerge_adapter"),
    "trainable_token_indices, a tied head": (
        adapted(peft.LoraConfig(target_modules=["c_attn"], trainable_token_indices=[1, 2]), gpt2),
        r"is a peft.utils.other.TrainableTokensWrapper.*trainable_token_indices",
    ),
    "prompt learning": (
        adapted(peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
        r"learns by PROMPT_TUNING.*virtual tokens.*use LoRA",
    ),
}


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
    with pytest.raises(ValueError, match=r"answers for \(8, 8\) tokens of \(8, 6\).*use LoRA"):
        make_trainer(build(), head_mode="exact", **given).train()


@pytest.mark.parametrize("case", [name for name, case in SAMPLED.items() if case.has_token_items])
def test_a_batch_without_a_supervised_token_has_a_gradient_of_zero_everywhere(case):
    model, head, inputs, _ = SAMPLED[case].prepared()
    with head.only(drawn_ids(0), SHARED_IDS, POSITIONS[:0]):
        logits = model(**inputs).logits
        logits.sum().backward()
    assert logits.shape == (0, 9)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if not parameter.requires_grad else not parameter.grad.any(), name


def test_trainable_token_indices_leave_an_untied_head_alone():
    model = peft.get_peft_model(llama(C), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    check_head(model, SampledHead(model, find_head_layers(model, C)), tokens(2, C))


# The table


def test_every_row_of_the_table_is_proved_here_and_every_case_is_in_it():
    items = re.findall(r"^\| `([^|]*)` \|", TABLE.read_text(), re.MULTILINE)
    named = [name for item in items for name in item.split("`, `")]
    assert sorted(named) == sorted([*SAMPLED, *REFUSED])
