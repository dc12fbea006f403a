"""The student's output head, switched to the sampled classes for the length of a training step.

The head module stays the module it is: only the *instance's* forward is replaced while a sample is set, so parameter
names, ties, wrappers, autocast and checkpoints see an ordinary model, and with no sample set it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode; then each module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _HeadReached(Exception):
    """Ends a forward once the head has been given its features."""

    def __init__(self, features: Tensor):
        self.features = features


@torch.no_grad()
def head_features(model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the head is given for these inputs, ``[N, d]`` or ``[B, S, d]``, with the model in evaluation mode.

    Nothing after it is computed.

    Args:
        model: a model, not wrapped for several processes.
        head: its output head.
        inputs: without labels.
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
    raise ValueError(f"{type(model).__name__} does not call its output head, a {type(head).__name__}")
