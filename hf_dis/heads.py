"""The student's output head, switched to the drawn classes for the length of a training step.

The head module stays the module it is: only the *instance's* forward is replaced while a draw is set, so parameter
names, ties, wrappers, autocast and checkpoints see an ordinary model, and with no draw set it is one.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .drawn import drawn_logits

# What ranking and drawing cost a row, and what a gathered class costs, in classes of a dense product over all of them.
# From benchmarks/crossover.py on two CPU cores.
DRAW_COST, GATHER_COST = 2000, 50


def sampling_pays(num_classes: int, num_sampled: int, num_shared: int) -> tuple[bool, str]:
    """Whether drawn classes are computed faster than all of them, and why."""
    cost = DRAW_COST + GATHER_COST * num_sampled + num_shared
    why = f"drawing {num_sampled} classes a row and {num_shared} for all costs about as much as computing {cost:,}"
    return cost < num_classes, f"{why}; there are {num_classes:,}"


class SampledHead:
    """A linear output head that can be told to compute drawn classes only.

    Args:
        module: the student's output head, see :func:`find_head`.
        row_sparse: while it is switched, give its parameters sparse gradients, which hold the drawn rows only.
    """

    def __init__(self, module: nn.Linear, row_sparse: bool = False):
        self.module, self.row_sparse = module, row_sparse

    @contextmanager
    def only(self, row_ids: Tensor, shared_ids: Tensor, positions: Tensor | None = None) -> Iterator[None]:
        """Within this context the head, and so the student, answers for the drawn classes only.

        Leave it after backward: activation checkpointing runs the head a second time there.
        """
        self.set(row_ids, shared_ids, positions)
        try:
            yield
        finally:
            self.clear()

    def set(self, row_ids: Tensor, shared_ids: Tensor, positions: Tensor | None = None) -> None:
        """Switches the head to the drawn classes.

        Args:
            row_ids: classes of each row, ``[N, R]``.
            shared_ids: classes of all rows, ``[K_t]``.
            positions: where the rows are among the flattened positions ``[B·S]`` that the head is given, ``[N]``; its
                output is then ``[N, R + K_t]``. None: a row is an example.
        """
        if "drawn" not in self.module.__dict__:
            self.module.__dict__["undrawn_forward"] = self.module.__dict__.get("forward")
        self.module.drawn = (row_ids, shared_ids, positions, self.row_sparse)
        self.module.forward = types.MethodType(_drawn_forward, self.module)

    def clear(self) -> None:
        """Gives the head its own forward back."""
        state = self.module.__dict__
        if state.pop("drawn", None) is not None:
            del state["forward"]
            replaced = state.pop("undrawn_forward")  # an instance's own, as accelerate's hooks put it there
            if replaced is not None:
                state["forward"] = replaced


def _drawn_forward(module: nn.Linear, features: Tensor) -> Tensor:
    row_ids, shared_ids, positions, row_sparse = module.drawn
    leading, flat = features.shape[:-1], features.reshape(-1, features.shape[-1])
    if positions is not None:
        leading, flat = row_ids.shape[:1], flat[positions]
    elif len(leading) == 2 and leading[0] == len(row_ids):
        # The model picks one position of each example after the head: all of them answer for its classes.
        row_ids = row_ids.repeat_interleave(leading[1], 0)
    elif leading != row_ids.shape[:1]:
        raise ValueError(
            f"the head {type(module).__name__} got features of shape {tuple(features.shape)} for {len(row_ids)} rows "
            "of drawn classes: it has to see one feature vector a row, [N, d], or a sequence of them, [N, S, d]"
        )
    logits = drawn_logits(flat, module.weight, module.bias, row_ids, shared_ids, row_sparse)
    return logits.view(*leading, logits.shape[1])


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
    was_training = model.training
    model.eval()
    try:
        model(**inputs)
    except _HeadReached as reached:
        return reached.features
    finally:
        hook.remove()
        model.train(was_training)
    raise ValueError(f"{type(model).__name__} does not call its output head, a {type(head).__name__}")


def find_head(model: nn.Module, num_classes: int, head_name: str | None = None) -> str:
    """Finds the student's output head.

    A language model names it itself (``get_output_embeddings``); for a classifier it is the only ``nn.Linear`` with
    C outputs.

    Args:
        model: the student.
        num_classes: C.
        head_name: the head's name among ``model.named_modules()``, if the rule does not find it.

    Returns:
        the name of the module.

    Raises:
        ValueError: if there is no head, or more than one candidate; lists them.
    """
    modules = dict(model.named_modules())
    candidates = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if head_name is not None:
        if head_name not in modules:
            raise ValueError(
                f"head_name is {head_name!r}, but {type(model).__name__} has no such module; "
                f"linear layers with {num_classes} outputs: {candidates or 'none'}"
            )
        if not isinstance(modules[head_name], nn.Linear) or modules[head_name].out_features != num_classes:
            raise ValueError(
                f"head_name is {head_name!r}, a {type(modules[head_name]).__name__}: the head has to be an nn.Linear "
                f"with {num_classes} outputs; candidates: {candidates or 'none'}"
            )
        return head_name
    output_embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    named = [name for name in candidates if modules[name] is output_embeddings]
    if len(named or candidates) != 1:
        raise ValueError(
            f"cannot tell which layer of {type(model).__name__} is the output head with {num_classes} classes: "
            f"candidates are {candidates or 'none'}; name it with head_name, or use head_mode='exact'"
        )
    return (named or candidates)[0]


@torch.no_grad()
def check_head(
    model: nn.Module,
    head: SampledHead,
    inputs: dict[str, Tensor],
    head_name: str,
    precision: torch.dtype | None = None,
) -> None:
    """Compares the switched head with the full one on a few rows; run once, at the first step.

    Args:
        model: the student.
        head: its head.
        inputs: some rows, without labels.
        head_name: for the message.
        precision: the narrowest type that the model computes in, if narrower than its logits: they agree to that.

    Raises:
        ValueError: if the student's logits are not those of the head at the same classes: something in the model
            comes after the head, or the wrong layer was taken for it.
    """
    was_training = model.training
    model.eval()
    try:
        full = model(**inputs).logits
        num_classes = full.shape[-1]
        columns = torch.arange(min(4, num_classes), device=full.device)
        row_ids = (columns * 7 + torch.arange(len(full), device=full.device)[:, None]) % num_classes
        shared_ids = (columns * 3 + 1) % num_classes
        with head.only(row_ids, shared_ids):
            drawn = model(**inputs).logits
    finally:
        model.train(was_training)
    expected = torch.cat([full.gather(1, row_ids), full[:, shared_ids]], 1)
    tolerance = 8 * torch.finfo(precision or full.dtype).eps * float(full.abs().max().clamp_min(1))
    if drawn.shape != expected.shape or not torch.allclose(drawn, expected, rtol=0, atol=tolerance):
        gap = (
            "shapes differ" if drawn.shape != expected.shape else f"off by up to {(drawn - expected).abs().max():.3g}"
        )
        raise ValueError(
            f"{type(model).__name__} does not return the output of {head_name!r} as its logits ({gap}): another layer "
            "comes after it. Name the right head with head_name, or use head_mode='exact'"
        )
