"""Every kind of head in docs/heads.md: the models whose heads can be sampled, and those that are refused."""

from collections.abc import Callable
from dataclasses import dataclass

import peft
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
    llama,
    llama_sequences,
    spread_out,
    t5,
    tokens,
    vit,
)
from torch import Tensor, nn

from hf_dis.head.switch import SampledHead
from hf_dis.models.head_search import find_head_layers

C, N, LENGTH = 23, 3, 6
TAIL_IDS = torch.tensor([[0, 5, 9, 22]])
TAILS = torch.tensor([[0, 5, 9, 22], [1, 5, 6, 7]])
POSITIONS = torch.tensor([0, 3, 4, 7, 10, 12, 16])  # among the N x LENGTH tokens


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of some function of the logits that treats no two of them alike."""
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    model.zero_grad()
    (weights * logits.log_softmax(1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sampled_ids(num_items: int) -> Tensor:
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
    """A head's weight over one process, on a mesh that is not one of a ``tp_plan``."""
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
    "spread by other means": (
        with_weight(tensor_parallel),
        r"weight of .*'lm_head' is a DTensor.*one group of processes.*fsdp_size",
    ),
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
