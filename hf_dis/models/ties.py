"""Tied weights: the modules that hold the same parameter, and the embeddings that share an output head's weight."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def modules_with(model: nn.Module, parameter: nn.Parameter) -> dict[str, nn.Module]:
    """Finds the modules that hold a parameter as their own, by name; more than one where the parameter is tied."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(own is parameter for own in module.parameters(recurse=False))
    }


def find_tied_embeddings(model: nn.Module, head_layers: Iterable[str]) -> tuple[str, ...]:
    """Finds the embeddings that share the trainable weight of an output head.

    Args:
        model: the student.
        head_layers: the linear layers of its output head among ``model.named_modules()``.

    Returns:
        the names of the embeddings among ``model.named_modules()``.
    """
    weights = [model.get_submodule(name).weight for name in head_layers]
    found = {
        name: None
        for weight in weights
        if weight.requires_grad
        for name, module in modules_with(model, weight).items()
        if isinstance(module, nn.Embedding)
    }
    return tuple(found)
