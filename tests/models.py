"""Tiny models built from configurations, random images, and what the tests ask of them."""

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
    """The global generator is left as it was: ``model_init`` is called in the middle of a run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spread_out(kind(config), spread)


def spread_out(model: nn.Module, spread: float) -> nn.Module:
    """Scales the output head, whose bias is zero at the start: an untrained model answers alike for all classes."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(spread)
        if spread != 1:
            head.bias.normal_(std=0.3)
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


# Every family of image classifiers that the head switch promises to work with, and the images it takes.
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


def images(num_rows: int, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labelled_images(num_rows: int, num_labels: int, seed: int = 0) -> list[dict]:
    """A data set of 8x8 images with labels, as ``Trainer`` takes it."""
    return [
        {"pixel_values": image, "labels": (3 * row) % num_labels}
        for row, image in enumerate(images(num_rows, seed=seed))
    ]


def patched_modules(model: nn.Module) -> list[str]:
    """Modules whose forward is not that of their class."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]
