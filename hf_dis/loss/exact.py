"""Losses on all classes, with the gradient computed in forward, block by block.

Beside the student's logits only their gradient is of size ``[N, C]``. :mod:`hf_dis.loss.exact_head` holds neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import uses_triton
from hf_dis.loss.classes import ALL_CLASSES
from hf_dis.loss.divergence import FORWARD_KL, Divergence
from hf_dis.loss.objective import Answer, Losses, Objective, at_temperature_one, mixture, objective_losses
from hf_dis.models.after_head import AfterHead
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.targets import block_items, widen

# Logits that the passes of a loss take at a time on an accelerator: 32 MiB per intermediate tensor in float32.
PASS_ELEMENTS = 2**23


class Block(NamedTuple):
    """Logits that exist at a time.

    Attributes:
        items: of the block.
        logits: the student's, ``[n, V]``.
        slopes: where their gradient goes, ``[n, V]``, or None; it may be ``logits``.
    """

    items: slice
    logits: Tensor
    slopes: Tensor | None


class ExactTerms(ABC):
    """Computes the terms of a loss on all classes block by block, as the teacher answers.

    A subclass gives the student's logits of a block. Chunks of the teacher and blocks need not agree.

    Args:
        objective: the loss.
        num_items: N.
        block_items: items of a block.
        with_kl: add the divergence at temperature 1, as far as the teacher is known at that temperature.
        after_head: computed on the logits of a block before the loss; None: the logits are the student's.
        factors: the gradient of every item is multiplied by, ``[N]``; None: by one.
    """

    def __init__(
        self,
        objective: Objective,
        num_items: int,
        block_items: int,
        with_kl: bool = False,
        after_head: AfterHead | None = None,
        factors: Tensor | None = None,
    ):
        self.objective, self.num_items, self._block_items = objective, num_items, max(1, block_items)
        self._with_kl, self._after_head, self._factors = with_kl, after_head, factors
        self._first, self._parts = 0, []
        self._block: Block | None = None

    @abstractmethod
    def _open(self, items: slice) -> tuple[Tensor, Tensor | None]:
        """The logits of a block of items, ``[n, V]`` with V >= C, and where their gradient goes, or None.

        The gradient has the shape of the logits, and may take their place.
        """

    def _close(self, block: Block) -> None:  # noqa: B027 - nothing is left to do where the gradient is kept
        """Takes the gradient of a block."""

    @torch.no_grad()
    def add(self, chunk: Tensor | CachedTargets | None) -> None:
        """Computes the loss of the next items.

        Args:
            chunk: the teacher's targets: logits ``[n, C]``, or stored targets; None: all items, without a teacher.

        Raises:
            ValueError: if the teacher has targets of more than N items.
        """
        answer = (chunk.ids, chunk.log_probs, chunk.target) if isinstance(chunk, CachedTargets) else chunk
        self._add(answer, self.num_items if chunk is None else len(chunk))

    def _add(self, answer: Answer, size: int) -> None:
        """Computes the loss of the next items, of which the teacher gave an answer."""
        if self._first + size > self.num_items:
            raise ValueError(
                f"the teacher has targets of {self._first + size} items or more, and the student has logits of "
                f"{self.num_items}: give both the same items"
            )
        start = 0
        while start < size or not self._parts:  # without items there is one empty part
            if self._block is None:
                items = slice(self._first, min(self._first + self._block_items, self.num_items))
                self._block = Block(items, *self._open(items))
            stop = min(size, start + self._block.items.stop - self._first)
            self._passes(self._block, self._first, _part(answer, slice(start, stop)), stop - start)
            self._first, start = self._first + stop - start, stop
            if self._first == self._block.items.stop:
                block, self._block = self._block, None
                self._close(block)
                del block  # the next block is computed without this one in memory

    def add_all(self, teacher: Iterable[Tensor | CachedTargets] | None) -> None:
        """Computes the loss of all items.

        Args:
            teacher: the targets of consecutive chunks of the items; None: cross-entropy alone.
        """
        for chunk in [None] if teacher is None else teacher:
            self.add(chunk)
            del chunk  # the next chunk is computed without this one in memory

    def terms(self) -> Losses:
        """The terms ``kd_loss``, ``ce_loss`` and ``kl``, ``[N]`` each; absent ones are left out.

        Raises:
            ValueError: if the teacher had targets of fewer than N items.
        """
        if self._first < self.num_items:
            raise ValueError(
                f"the teacher has targets of {self._first} items, and the student has logits of {self.num_items}: "
                "give both the same items"
            )
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}

    def _passes(self, block: Block, first: int, answer: Answer, size: int) -> None:
        """Computes the terms of items of a block and their gradient, by kernels or in passes over some items."""
        num_classes = self.objective.num_classes
        by_kernels = self.objective.classes is ALL_CLASSES and uses_triton(block.logits.device)
        if by_kernels and self._by_kernels(block, slice(first, first + size), answer):
            return
        for part in slices(size, self._pass_items(block.logits)):
            here = slice(first + part.start, first + part.stop)
            rows = slice(here.start - block.items.start, here.stop - block.items.start)
            raw = block.logits[rows, :num_classes]
            values = widen(raw if self._after_head is None else self._after_head(raw))
            losses, slope = objective_losses(values, _part(answer, part), self.objective, here, self._with_kl)
            self._parts.append(losses)
            if block.slopes is not None:
                block.slopes[rows, :num_classes] = self._slope(slope, values, here)

    def _by_kernels(self, block: Block, here: slice, answer: Answer) -> bool:
        """As :meth:`_passes`, at once; returns False where the kernels lack the divergence."""
        from hf_dis.loss.triton_exact import block_losses, has_kernels

        if not has_kernels(answer, self.objective.divergence):
            return False
        rows = slice(here.start - block.items.start, here.stop - block.items.start)
        classes = self.objective.num_classes
        logits = block.logits[rows, :classes]
        slopes = None if block.slopes is None else block.slopes[rows, :classes]
        given = here, self._after_head or AfterHead()
        losses = block_losses(logits, answer, self.objective, *given, self._factors, slopes)
        if self._with_kl and answer is not None:
            at_one = self.objective._replace(temperature=1.0, labels=None)

            def loss_of(divergence: Divergence) -> Tensor:
                return block_losses(logits, answer, at_one._replace(divergence=divergence), *given)["kd_loss"]

            losses |= at_temperature_one(loss_of, answer, self.objective, losses["kd_loss"])
        self._parts.append(losses)
        return True

    def _pass_items(self, logits: Tensor) -> int:
        """Items that a pass takes at a time: as many as stay in a processor's cache, elsewhere ``PASS_ELEMENTS``."""
        in_cache = logits.device.type == "cpu"
        return block_items(logits) if in_cache else max(1, PASS_ELEMENTS // max(1, logits.shape[1]))

    def _slope(self, slope: Tensor, values: Tensor, items: slice) -> Tensor:
        """The gradient on the logits before the operations after the head."""
        slope = slope if self._after_head is None else self._after_head.gradient(slope, values)
        return slope if self._factors is None else slope * self._factors[items, None]


class LogitsLoss(ExactTerms):
    """The loss of every item on all classes, differentiable once in the student's logits.

    The gradient is kept in the type of the logits. It is kept in float32 for float16, where small values would vanish
    before backward scales them.

    Args:
        logits: the student's, ``[N, V]`` with V >= C.
        objective: the loss.
    """

    def __init__(self, logits: Tensor, objective: Objective):
        super().__init__(objective, len(logits), len(logits))
        self._logits, self._gradient = logits, None
        if logits.requires_grad:
            dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
            self._gradient = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
            self._gradient[:, objective.num_classes :] = 0

    def _open(self, items: slice) -> tuple[Tensor, Tensor | None]:
        return self._logits.detach(), self._gradient

    def result(self) -> tuple[Tensor, Losses]:
        """The loss ``[N]``, and its terms ``kd_loss`` and ``ce_loss`` ``[N]``, without gradient."""
        terms = self.terms()
        loss = mixture(terms, self.objective)
        return (loss if self._gradient is None else _GivenGradient.apply(self._logits, loss, self._gradient)), terms


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
        check_first_backward(gradient)
        size = block_items(gradient)
        for part, factor in zip(gradient.split(size), grad[:, None].split(size), strict=True):
            part.mul_(factor)  # in the wider of both types
        return gradient.to(ctx.dtype), None, None


def check_first_backward(gradient: object | None) -> None:
    """Checks that a gradient which one backward pass uses up is still there.

    Raises:
        RuntimeError: if it is None.
    """
    if gradient is None:
        raise RuntimeError(
            "the exact loss was differentiated twice: its gradient is kept for one backward pass; compute the loss "
            "again"
        )


def exact_loss(
    logits: Tensor,
    num_classes: int,
    teacher: Iterable[Tensor | CachedTargets] | None,
    labels: Tensor | None,
    temperature: float,
    hard_label_weight: float,
    divergence: Divergence = FORWARD_KL,
) -> tuple[Tensor, Losses]:
    """The loss of every item on all classes, (1 - λ) KD + λ CE, differentiable once in the logits.

    Args:
        logits: the student's, ``[N, V]`` with V >= C.
        num_classes: C; the classes from C on have no part in the loss.
        teacher: logits ``[n, C]`` or stored targets for consecutive chunks of the items; None: cross-entropy alone.
        labels: class ids ``[N]``, or None.
        temperature: τ > 0.
        hard_label_weight: λ in [0, 1].
        divergence: KD.

    Returns:
        the loss ``[N]``, and its existing terms among ``kd_loss`` and ``ce_loss``, ``[N]`` each, without gradient.
    """
    exact = LogitsLoss(logits, Objective(num_classes, labels, temperature, hard_label_weight, divergence))
    exact.add_all(teacher)
    return exact.result()


class _OfStudent(ExactTerms):
    """The terms without gradient, of logits that a function gives."""

    def __init__(self, student: Callable[[slice], Tensor], *of_terms: Any):
        super().__init__(*of_terms)
        self._student = student

    def _open(self, items: slice) -> tuple[Tensor, Tensor | None]:
        return self._student(items), None


def exact_losses(
    student: Callable[[slice], Tensor],
    num_items: int,
    block_items: int,
    num_classes: int,
    teacher: Iterable[Tensor | CachedTargets] | None,
    labels: Tensor | None,
    temperature: float,
    with_kl: bool = False,
    divergence: Divergence = FORWARD_KL,
) -> Losses:
    """The terms of the loss of every item on all classes, without gradient.

    Args:
        student: gives the student's logits of a slice of the items, ``[n, V]``.
        num_items: N.
        block_items: the most items that the student is asked for at a time.
        num_classes, teacher, labels, temperature: as for :func:`exact_loss`.
        with_kl: add KL(p ‖ s) and the divergence at temperature 1, as far as the teacher is known at that temperature.
        divergence: KD.

    Returns:
        ``kd_loss``, ``ce_loss``, ``kl`` and, unless the divergence is the forward KL, the divergence under its
        name, ``[N]`` each; absent ones are left out.
    """
    objective = Objective(num_classes, labels, temperature, divergence=divergence)
    exact = _OfStudent(student, objective, num_items, block_items, with_kl)
    exact.add_all(teacher)
    return exact.terms()


def slices(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices that cover a size; at least one, even if empty."""
    return (slice(start, min(start + step, size)) for start in range(0, max(1, size), step))


def _part(answer: Answer, items: slice) -> Answer:
    if isinstance(answer, tuple):
        return tuple(value[items] for value in answer)
    return None if answer is None else answer[items]
