"""Losses on all classes, with the gradient computed in forward, block by block.

Beside the student's logits only their gradient is of size ``[N, C]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.loss.cross_entropy import exact_cross_entropy
from hf_dis.loss.divergence import exact_forward_kl, mix, sparse_forward_kl
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.targets import CHUNK_ELEMENTS, block_items, widen

Losses = dict[str, Tensor]


class _GivenGradient(torch.autograd.Function):
    """A loss per item whose gradient on the logits is known already; backward uses the gradient up."""

    @staticmethod
    def forward(ctx, logits, loss, gradient):
        ctx.gradient, ctx.dtype = gradient, logits.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the exact loss was differentiated twice: its gradient is kept for one backward pass")
        size = block_items(gradient)
        for part, factor in zip(gradient.split(size), grad[:, None].split(size), strict=True):
            part.mul_(factor)  # in the wider of both types
        return gradient.to(ctx.dtype), None, None


def exact_loss(
    logits: Tensor,
    num_classes: int,
    teacher: Iterable[Tensor | CachedTargets] | None,
    labels: Tensor | None,
    temperature: float,
    hard_label_weight: float,
) -> tuple[Tensor, Losses]:
    """The loss of every item on all classes, (1 - λ) KD + λ CE, differentiable once in the logits.

    The gradient is kept in the type of the logits. It is kept in float32 for float16, where small values would vanish
    before backward scales them.

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
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
        gradient[:, num_classes:] = 0
    student = logits.detach().__getitem__
    terms = exact_losses(student, len(logits), num_classes, teacher, labels, temperature, hard_label_weight, gradient)
    ce = terms.get("ce_loss")
    loss = ce if teacher is None else mix(terms["kd_loss"], ce, hard_label_weight)
    return (loss if gradient is None else _GivenGradient.apply(logits, loss, gradient)), terms


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
        gradient: filled with the gradient of (1 - λ) KD + λ CE on the first C logits, ``[N, V]``; or None.
        with_kl: add the divergence at temperature 1, as far as the teacher is known at that temperature.

    Returns:
        ``kd_loss``, ``ce_loss`` and ``kl``, ``[N]`` each, as far as there are any.
    """
    parts: list[Losses] = []
    for items, answer in _pieces(teacher, num_items, num_classes):
        logits = student(items)[:, :num_classes]
        for block in _slices(len(logits), block_items(logits)):
            here = slice(items.start + block.start, items.start + block.stop)
            losses, slope = _block(
                widen(logits[block]),
                _part(answer, block),
                None if labels is None else labels[here],
                temperature,
                hard_label_weight,
                with_kl,
            )
            parts.append(losses)
            if gradient is not None:
                gradient[here, :num_classes] = slope
        del logits, answer  # the next chunk is computed without this one in memory
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# Stored targets by class ids, log-probabilities and target; logits; or no teacher.
_Answer = tuple[Tensor, Tensor, Tensor] | Tensor | None


def _pieces(
    teacher: Iterable[Tensor | CachedTargets] | None, num_items: int, num_classes: int
) -> Iterator[tuple[slice, _Answer]]:
    """Consecutive items of at most ``CHUNK_ELEMENTS`` logits, with the teacher's answer; at least one piece."""
    first = 0
    for chunk in [None] if teacher is None else teacher:
        answer = (chunk.ids, chunk.log_probs, chunk.target) if isinstance(chunk, CachedTargets) else chunk
        size = num_items if chunk is None else len(chunk)
        for part in _slices(size, max(1, CHUNK_ELEMENTS // num_classes)):
            yield slice(first + part.start, first + part.stop), _part(answer, part)
        first += size
        del chunk, answer


def _slices(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices that cover a size; at least one, even if empty."""
    return (slice(start, min(start + step, size)) for start in range(0, max(1, size), step))


def _part(answer: _Answer, items: slice) -> _Answer:
    if isinstance(answer, tuple):
        return tuple(value[items] for value in answer)
    return None if answer is None else answer[items]


def _block(
    logits: Tensor,
    answer: _Answer,
    labels: Tensor | None,
    temperature: float,
    hard_label_weight: float,
    with_kl: bool,
) -> tuple[Losses, Tensor | None]:
    """The terms of a block of items, ``[n]``, and the gradient of their mixture, ``[n, C]``."""
    losses, slopes = {}, []
    if answer is not None:
        losses["kd_loss"], slope = _forward_kl(logits, answer, temperature)
        slopes.append(slope)
        if with_kl and temperature == 1:
            losses["kl"] = losses["kd_loss"]
        elif with_kl and isinstance(answer, Tensor):
            losses["kl"], _ = _forward_kl(logits, answer, 1.0)
    if labels is not None:
        losses["ce_loss"], slope = exact_cross_entropy(logits, labels)
        slopes.append(slope)
    if len(slopes) == 2:
        return losses, slopes[0].lerp_(slopes[1], hard_label_weight)
    return losses, slopes[0] if slopes else None


def _forward_kl(logits: Tensor, answer: _Answer, temperature: float) -> tuple[Tensor, Tensor]:
    if isinstance(answer, tuple):
        return sparse_forward_kl(logits, *answer, temperature)
    return exact_forward_kl(logits, answer.to(logits.dtype), temperature)
