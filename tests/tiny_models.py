"""Tiny models built from configurations, random images and tokens, and functions that tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def vit(num_labels: int, seed: int = 0, spread: float = 1.0, **config) -> hf.ViTForImageClassification:
    """A ViT for 8x8 images. ``spread`` scales its logits: near 0.02 for 1, near 1 for 30."""
    config = hf.ViTConfig(image_size=8, patch_size=4, num_labels=num_labels, **SMALL, **config)
    return _built(hf.ViTForImageClassification, config, seed, spread)


def resnet(num_labels: int, seed: int = 0, spread: float = 1.0) -> hf.ResNetForImageClassification:
    """A ResNet: batch normalisation, a head inside a ``Sequential``, images of any size."""
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=num_labels
    )
    return _built(hf.ResNetForImageClassification, config, seed, spread)


def _built(kind: type[nn.Module], config: hf.PreTrainedConfig, seed: int, spread: float) -> nn.Module:
    """Builds a model without moving the global generator: ``model_init`` is called in the middle of a run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spread_out(kind(config), spread)


def tails_of_items(tail_ids: Tensor, num_items: int) -> Tensor:
    """The classes of each item's tail, ``[N, K_t]``: item i uses tail i mod G."""
    items = [tail_ids[item % len(tail_ids)] for item in range(num_items)]
    return torch.stack(items) if items else tail_ids[:0]


def column_ids(sample) -> Tensor:
    """The class of every column of a sample, ``[N, R + K_t]``."""
    return torch.cat([sample.item_ids, tails_of_items(sample.tail_ids, len(sample))], 1)


def spread_out(model: nn.Module, spread: float) -> nn.Module:
    """Scales the output head: an untrained model has nearly the same logit for all classes."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    named = getattr(model, "get_output_embeddings", lambda: None)()
    head = linear[-1] if named is None else named
    with torch.no_grad():
        head.weight.mul_(spread)
        if spread != 1 and head.bias is not None:
            head.bias.normal_(std=0.3)
    return model


# Text models: no dropout, token 0 is the padding. Where the head is tied, ``spread`` scales the embeddings too.

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(vocab_size: int, seed: int = 0, spread: float = 1.0, **config) -> hf.LlamaForCausalLM:
    """A causal language model, its head not tied."""
    config = hf.LlamaConfig(vocab_size=vocab_size, pad_token_id=0, **{**SMALL, **config})
    return _built(hf.LlamaForCausalLM, config, seed, spread)


def gpt2(vocab_size: int, seed: int = 0, spread: float = 1.0, **config) -> hf.GPT2LMHeadModel:
    """A causal language model, its head tied to the embeddings."""
    config = hf.GPT2Config(vocab_size=vocab_size, n_positions=64, **{**GPT2, **GPT2_TOKENS, **config})
    return _built(hf.GPT2LMHeadModel, config, seed, spread)


def bert_mlm(vocab_size: int, seed: int = 0, spread: float = 1.0, **config) -> hf.BertForMaskedLM:
    """A masked language model, its head tied and with a bias."""
    return _built(hf.BertForMaskedLM, _bert(vocab_size=vocab_size, **config), seed, spread)


def bert_tokens(num_labels: int, seed: int = 0, spread: float = 1.0, **config) -> hf.BertForTokenClassification:
    """A token classifier with 50 tokens."""
    config = {"vocab_size": 50, "num_labels": num_labels, **config}
    return _built(hf.BertForTokenClassification, _bert(**config), seed, spread)


def bert_sequences(num_labels: int, seed: int = 0, spread: float = 1.0, **config) -> hf.BertForSequenceClassification:
    """A sequence classifier with 50 tokens, its head after the pooling."""
    config = {"vocab_size": 50, "num_labels": num_labels, **config}
    return _built(hf.BertForSequenceClassification, _bert(**config), seed, spread)


def _bert(**config) -> hf.BertConfig:
    return hf.BertConfig(max_position_embeddings=64, **{**SMALL, **NO_DROPOUT, **config})


def llama_sequences(
    num_labels: int, seed: int = 0, spread: float = 1.0, **config
) -> hf.LlamaForSequenceClassification:
    """A sequence classifier with 50 tokens, its head before the pooling."""
    config = {"vocab_size": 50, "num_labels": num_labels, **SMALL, **config}
    return _built(hf.LlamaForSequenceClassification, hf.LlamaConfig(pad_token_id=0, **config), seed, spread)


def gpt2_sequences(num_labels: int, seed: int = 0, spread: float = 1.0, **config) -> hf.GPT2ForSequenceClassification:
    """A sequence classifier with 50 tokens, its head before the pooling."""
    config = {"vocab_size": 50, "num_labels": num_labels, **GPT2, **GPT2_TOKENS, **config}
    return _built(hf.GPT2ForSequenceClassification, hf.GPT2Config(n_positions=64, **config), seed, spread)


def t5(vocab_size: int, seed: int = 0, spread: float = 1.0, **config) -> hf.T5ForConditionalGeneration:
    """An encoder-decoder, its head tied and scaled."""
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    small |= {"dropout_rate": 0.0, "initializer_factor": 0.2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = hf.T5Config(vocab_size=vocab_size, **{**small, **tokens, **config})
    return _built(hf.T5ForConditionalGeneration, config, seed, spread)


BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0, "max_position_embeddings": 64}
BART |= {
    f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in [("attention_heads", 2), ("ffn_dim", 32)]
}
BART |= {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def bart(vocab_size: int, seed: int = 0, spread: float = 1.0, **config) -> hf.BartForConditionalGeneration:
    """An encoder-decoder, its head tied and followed by a buffer, ``final_logits_bias``, which ``spread`` fills."""
    model = _built(
        hf.BartForConditionalGeneration, hf.BartConfig(vocab_size=vocab_size, **BART, **config), seed, spread
    )
    if spread != 1:
        model.final_logits_bias.copy_(torch.linspace(-1, 1, vocab_size))
    return model


def _regnet(num_labels):
    return hf.RegNetForImageClassification(
        hf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, num_labels=num_labels)
    )


def _convnext(num_labels):
    return hf.ConvNextForImageClassification(
        hf.ConvNextConfig(patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=num_labels)
    )


def _mobilenet(num_labels):
    return hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(depth_multiplier=0.25, classifier_dropout_prob=0.0, num_labels=num_labels)
    )


def _swin(num_labels):
    return hf.SwinForImageClassification(
        hf.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=num_labels,
        )
    )


def _dinov2(num_labels):
    return hf.Dinov2ForImageClassification(
        hf.Dinov2Config(
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=num_labels,
        )
    )


def _timm(num_labels):
    pytest.importorskip("timm")
    config = hf.TimmWrapperConfig(architecture="test_resnet", num_labels=num_labels)
    return hf.TimmWrapperForImageClassification(config)


# Every family of image classifiers that the head switch supports, and the size of its images.
FAMILIES: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "ViT": (vit, 8),
    "ResNet": (resnet, 32),
    "RegNet": (_regnet, 32),
    "ConvNext": (_convnext, 32),
    "MobileNetV2": (_mobilenet, 32),
    "Swin": (_swin, 32),
    "Dinov2": (_dinov2, 32),
    "timm": (_timm, 32),
}


def images(num_items: int, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_items, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labelled_images(num_items: int, num_labels: int, seed: int = 0) -> list[dict]:
    """A dataset of 8x8 images with labels, as ``Trainer`` takes it."""
    return [
        {"pixel_values": image, "labels": (3 * item) % num_labels}
        for item, image in enumerate(images(num_items, seed=seed))
    ]


def tokens(num_items: int, vocab_size: int, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """A batch of token ids, none of them among the first three, with the last of odd items padded."""
    ids = torch.randint(3, vocab_size, (num_items, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1::2, -1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def labelled_tokens(num_items: int, vocab_size: int, length: int = 6, seed: int = 0) -> list[dict]:
    """A dataset of token ids, each its own label, as a causal language model takes them; -100 at the padding."""
    batch = tokens(num_items, vocab_size, length, seed)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return [{name: value[item] for name, value in batch.items()} for item in range(num_items)]


def patched_modules(model: nn.Module) -> list[str]:
    """The names of modules whose forward is not that of their class."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Checks that the names are the same, and that tensors differ by at most the tolerance."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=name)
