"""The features that a model's output head is given, computed without the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from hf_dis.models.spread import is_fully_sharded


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


@contextmanager
def _first_feature(head: nn.Module) -> Iterator[None]:
    """Lets a head return the first entry of each feature vector within a context, without a product."""
    own = head.__dict__.get("forward")
    head.forward = lambda features: features[..., :1]
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


class _HeadReached(Exception):
    """Ends a forward once the head has been given its features."""


@torch.no_grad()
def head_features(model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Computes the input of a model's head, with the model in evaluation mode; the forward ends there.

    A forward of FSDP2 has to reach its end, so that head runs without a product.

    Args:
        model: a model, not wrapped for several processes.
        head: the model's output head.
        inputs: of the model, without labels.

    Returns:
        ``[N, d]`` or ``[B, S, d]``, without gradient, on the device where the model computes it.

    Raises:
        ValueError: if the model does not call its head.
    """
    held: list[Tensor] = []
    runs_on = is_fully_sharded(model)

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        held.append(args[0])
        if not runs_on:
            raise _HeadReached

    hook = head.register_forward_pre_hook(stop)
    try:
        with evaluating(model), _first_feature(head) if runs_on else nullcontext():
            model(**inputs)
    except _HeadReached:
        pass
    finally:
        hook.remove()
    if held:
        return held[0]
    raise ValueError(
        f"{type(model).__name__} does not call its output head, a {type(head).__name__}: the features have to pass "
        "through a head; name the layer that the model calls with head_name"
    )
