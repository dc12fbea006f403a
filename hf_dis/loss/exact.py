"""Losses on all classes, with the gradient computed in forward, block by block.

Besides the student's logits only their gradient is of size ``[N, C]``, and it has the type of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.loss.cross_entropy import exact_cross_entropy
from hf_dis.loss.divergence import exact_forward_kl, mix, sparse_forward_kl
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.targets import CHUNK_ELEMENTS, block_items, widen

Losses = dict[str, Tensor]


class _GivenGradient(torch.autograd.Function):
    """A loss per item whose gradient on the logits has been computed already."""

    @staticmethod
    def forward(ctx, logits, loss, gradient):
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the exact loss was differentiated twice: its gradient is kept for one backward pass")
        return gradient.mul_(grad[:, None].to(gradient.dtype)), None, None


def exact_loss(
    logits: Tensor,
    num_classes: int,
    teacher: Iterable[Tensor | CachedTargets] | None,
    labels: Tensor | None,
    temperature: float,
    hard_label_weight: float,
) -> tuple[Tensor, Losses]:
    """The loss of every item on all classes, (1 - λ) KD + λ CE, differentiable once in the logits.

    Args:
        logits: the student's, ``[N, V]`` with V >= C.
        num_classes: C; the classes from C on have no part in the loss.
        teacher: logits ``[n, C]`` or stored targets for consecutive chunks of the items; None: cross-entropy alone.
        labels: class ids ``[N]``, or None.
        temperature: τ > 0.
        hard_label_weight: λ in [0, 1].

    Returns:
        the loss ``[N]``, and its terms ``kd_loss`` and ``ce_loss`` ``[N]`` as far as there are any, without gradient.
    """
    gradient = None
    if logits.requires_grad:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        gradient[:, num_classes:] = 0
    with torch.no_grad():
        losses = exact_losses(
            logits.__getitem__, len(logits), num_classes, teacher, labels, temperature, hard_label_weight, gradient
        )
        ce = losses.get("ce_loss")
        loss = mix(losses["kd_loss"], ce, hard_label_weight) if "kd_loss" in losses else ce
    return (loss if gradient is None else _GivenGradient.apply(logits, loss, gradient)), losses


@torch.no_grad()
def exact_losses(
    student: Callable[[slice], Tensor],
    num_items: int,
    num_classes: int,
    teacher: Iterable[Tensor | CachedTargets] | None,
    labels: Tensor | None,
    temperature: float,
    hard_label_weight: float = 0.0,
    gradient: Tensor | None = None,
    with_kl: bool = False,
) -> Losses:
    """The terms of the loss of every item on all classes, without gradient.

    Args:
        student: gives the student's logits of a slice of the items, ``[n, V]``.
        num_items: N.
        num_classes, teacher, labels, temperature, hard_label_weight: as for :func:`exact_loss`.
        gradient: filled with the gradient of the mixed loss of each item on its logits, ``[N, V]``; or None.
        with_kl: the divergence at temperature 1 too, as far as the teacher is known at that temperature.

    Returns:
        ``kd_loss``, ``ce_loss`` and ``kl``, ``[N]`` each, as far as there are any.
    """
    kd_weight = 1.0 if labels is None else 1 - hard_label_weight
    parts: list[Losses] = []
    first = 0
    for chunk in _chunks(teacher, num_items, num_classes):
        size = len(chunk)
        logits = student(slice(first, first + size))[:, :num_classes]
        step = block_items(logits)
        for start in range(0, max(1, size), step):
            items = slice(start, min(start + step, size))
            part = widen(logits[items])
            here = slice(first + items.start, first + items.stop)
            losses, slopes = {}, []
            if teacher is not None:
                losses, slope = _distillation(part, chunk, items, temperature, with_kl)
                slopes.append(slope.mul_(kd_weight) if kd_weight != 1 else slope)
            if labels is not None:
                losses["ce_loss"], slope = exact_cross_entropy(part, labels[here])
                slopes.append(slope.mul_(1 if teacher is None else hard_label_weight))
            parts.append(losses)
            if gradient is not None:
                total = slopes[0] if len(slopes) == 1 else slopes[0].add_(slopes[1])
                gradient[here, :num_classes] = total
        first += size
        del chunk, logits  # the next chunk is computed without this one in memory
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chunks(
    teacher: Iterable[Tensor | CachedTargets] | None, num_items: int, num_classes: int
) -> Iterable[Tensor | CachedTargets | range]:
    """The teacher's chunks; without a teacher ranges of the items, at least one chunk be it empty."""
    if teacher is not None:
        return teacher
    size = max(1, CHUNK_ELEMENTS // num_classes)
    return (range(start, min(start + size, num_items)) for start in range(0, max(1, num_items), size))


def _distillation(
    logits: Tensor, chunk: Tensor | CachedTargets, items: slice, temperature: float, with_kl: bool
) -> tuple[Losses, Tensor]:
    losses = {}
    if isinstance(chunk, Tensor):
        teacher = widen(chunk[items])
        losses["kd_loss"], slope = exact_forward_kl(logits, teacher, temperature)
        if with_kl:
            losses["kl"], _ = (losses["kd_loss"], None) if temperature == 1 else exact_forward_kl(logits, teacher, 1.0)
    else:
        stored = chunk.ids[items], chunk.log_probs[items], chunk.target[items]
        losses["kd_loss"], slope = sparse_forward_kl(logits, *stored, temperature)
        if with_kl and temperature == 1:
            losses["kl"] = losses["kd_loss"]
    return losses, slope
