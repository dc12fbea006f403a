"""The features that a model's output head is given, computed without the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode within a context; each module then returns to its own mode."""
    # A teacher belongs to its user, who may train or add modules between steps, so that each step looks at all of
    # them. A model that is in evaluation mode already, as a teacher is, is left as it is.
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _HeadReached(Exception):
    """Ends a forward once the head has been given its features."""

    def __init__(self, features: Tensor):
        self.features = features


@torch.no_grad()
def head_features(model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Computes the input of a model's head, with the model in evaluation mode; the forward ends there.

    Args:
        model: a model, not wrapped for several processes.
        head: the model's output head.
        inputs: of the model, without labels.

    Returns:
        ``[N, d]`` or ``[B, S, d]``, without gradient, on the device where the model computes it.

    Raises:
        ValueError: if the model does not call its head.
    """

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _HeadReached(args[0])

    hook = head.register_forward_pre_hook(stop)
    try:
        with evaluating(model):
            model(**inputs)
    except _HeadReached as reached:
        return reached.features
    finally:
        hook.remove()
    raise ValueError(
        f"{type(model).__name__} does not call its output head, a {type(head).__name__}: the features have to pass "
        "through a head; name the layer that the model calls with head_name"
    )
