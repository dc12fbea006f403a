"""The loss on all classes from the input of the student's head: logits exist for a block of items at a time.

Forward computes the gradients of the head and of its input. A block's logits become their own gradient in place, and
are dropped once the gradient was multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.loss.divergence import FORWARD_KL, Divergence
from hf_dis.loss.exact import Block, ExactTerms, check_first_backward, slices
from hf_dis.loss.objective import Losses, Objective, mixture
from hf_dis.models.after_head import AfterHead
from hf_dis.precision import product_type, widens_products
from hf_dis.teacher.cached import CachedTargets

# Of the [n, C] logits of a block. Each block reads the whole head and adds to a gradient of its size. A processor took
# 28% longer with blocks of 16 items than with 67, at a million classes.
BLOCK_BYTES = 2**28
# The most of them on an accelerator.
DEVICE_BLOCK_BYTES = 5 * 2**26
# Elements of a product that is added to a gradient of a wider type.
ADDED_ELEMENTS = 2**24

Teacher = Iterable[Tensor | CachedTargets] | None


class HeadInput(NamedTuple):
    """A linear output head and what it was given.

    Attributes:
        features: input of the head, ``[N, d]``.
        weight: of the head, ``[V, d]``.
        bias: added to the logits, ``[V]``, or None.
        dtype: of the products; not float16, in which small gradients vanish.
        after_head: the operations after the bias; its own bias is None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    after_head: AfterHead | None = None

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tensors that get a gradient: features, weight and bias."""
        return self.features, self.weight, self.bias

    def detached(self, num_classes: int) -> HeadInput:
        """The same for the first C classes, without gradient and in the type of the products."""
        features, weight = (values.detach().to(self.dtype) for values in (self.features, self.weight[:num_classes]))
        bias = None if self.bias is None else self.bias.detach()[:num_classes].to(self.dtype)
        return self._replace(features=features, weight=weight, bias=bias)


class HeadLoss(ExactTerms):
    """The loss of every item on all classes, differentiable once in features, weight and bias.

    Args:
        head: the student's head and its input.
        objective: the loss.
        again: gives the teacher's targets once more. They are needed in backward if the items count differently, as
            the gradient of the weight is a sum over items.
        factors: the gradient of every item is multiplied by, ``[N]``; None: by one.
    """

    def __init__(
        self, head: HeadInput, objective: Objective, again: Callable[[], Teacher], factors: Tensor | None = None
    ):
        size = block_items(len(head.features), objective.num_classes, head)
        after_head = head.after_head if head.after_head != AfterHead() else None
        super().__init__(objective, len(head.features), size, after_head=after_head, factors=factors)
        self._head, self._again = head, again
        self._used = head.detached(objective.num_classes)
        # Gradients with factors are computed in backward, where autograd is off.
        self.gradients = Gradients(head, objective.num_classes, torch.is_grad_enabled() or factors is not None)

    def _open(self, items: slice) -> tuple[Tensor, Tensor | None]:
        with self._as_cast():
            logits = F.linear(self._used.features[items], self._used.weight, self._used.bias)
        return logits, (logits if self.gradients.wanted else None)

    def _close(self, block: Block) -> None:
        if block.slopes is not None:
            with self._as_cast():
                self.gradients.add(block.items, block.slopes, self._used)

    def _as_cast(self) -> torch.autocast:
        """The types are those of the products: autocast would cast them once more, and keep the copy."""
        return torch.autocast(self._used.features.device.type, enabled=False)

    def result(self) -> tuple[Tensor, Losses]:
        """The loss ``[N]``, and its terms ``kd_loss`` and ``ce_loss`` ``[N]``, without gradient."""
        terms = self.terms()
        loss = mixture(terms, self.objective)
        if self.gradients.wanted:
            loss = _GivenGradients.apply(*self._head.parameters, loss, self.gradients, self._recomputed())
        return loss, terms

    def _recomputed(self) -> Callable[[Tensor], Gradients]:
        """Computes the gradients once more, for factors ``[N]`` of the items."""
        # No method of this object, which holds the head in the type of the products until backward.
        return partial(_weighted_gradients, self._head, self.objective, self._again)


def exact_head_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Callable[[], Teacher],
    labels: Tensor | None,
    temperature: float,
    hard_label_weight: float,
    divergence: Divergence = FORWARD_KL,
) -> tuple[Tensor, Losses]:
    """The loss of every item on all classes, (1 - λ) KD + λ CE, differentiable once in features, weight and bias.

    Args:
        features: input of the head, ``[N, d]``.
        weight, bias: of the head, ``[C, d]`` and ``[C]`` or None.
        teacher: gives logits ``[n, C]`` or stored targets for consecutive chunks of the items; None: cross-entropy
            alone. It is called once, and once more in backward if the items count differently.
        labels: class ids ``[N]``, or None.
        temperature: τ > 0.
        hard_label_weight: λ in [0, 1].
        divergence: KD.

    Returns:
        the loss ``[N]``, and its existing terms among ``kd_loss`` and ``ce_loss``, ``[N]`` each, without gradient.
    """
    head = HeadInput(features, weight, bias, product_type(features))
    exact = HeadLoss(head, Objective(len(weight), labels, temperature, hard_label_weight, divergence), teacher)
    exact.add_all(teacher())
    return exact.result()


def block_items(num_items: int, num_classes: int, head: HeadInput) -> int:
    """Counts the items of a block of logits; on an accelerator all blocks are of one size.

    Args:
        num_items: N.
        num_classes: C.
        head: the head.
    """
    item_bytes = num_classes * head.dtype.itemsize
    if head.features.device.type == "cpu":
        return BLOCK_BYTES // item_bytes
    return -(-num_items // max(1, -(-num_items * item_bytes // DEVICE_BLOCK_BYTES)))


def _weighted_gradients(
    head: HeadInput, objective: Objective, again: Callable[[], Teacher], factors: Tensor
) -> Gradients:
    """The gradients where the items count differently, ``factors`` ``[N]``: computed from the start."""
    exact = HeadLoss(head, objective, again, factors)
    exact.add_all(again())
    return exact.gradients


class Gradients:
    """Sums the gradients of features, weight and bias block by block.

    Those of weight and bias are summed in float32 or wider: a sum in bfloat16 would be rounded once per block.

    Args:
        head: the head and its input.
        num_classes: C.
        wanted: compute those that ``requires_grad`` asks for; False: none.
    """

    def __init__(self, head: HeadInput, num_classes: int, wanted: bool):
        features, weight, bias = (
            value if wanted and value is not None and value.requires_grad else None for value in head.parameters
        )
        self._num_classes, self._is_empty = num_classes, True
        self.features = None if features is None else torch.empty_like(features)
        self.weight = None if weight is None else torch.empty_like(weight, dtype=_sum_type(weight))
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=_sum_type(bias))
        self.wanted = any(value is not None for value in (features, weight, bias))

    def add(self, items: slice, slopes: Tensor, used: HeadInput) -> None:
        """Adds the part of a block of items.

        Args:
            items: of the block.
            slopes: gradient on the logits of the first C classes, ``[n, C]``.
            used: the head of these classes.
        """
        if self.features is not None:
            _product(self.features[items], slopes, used.weight)
        if self.weight is not None:
            self._add_product(slopes.T, used.features[items])
        if self.bias is not None:
            self.bias[: self._num_classes] += slopes.sum(0, dtype=self.bias.dtype)
        self._is_empty = False

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right`` ``[C, d]`` to the weight's gradient, or starts the gradient with it."""
        total = self.weight[: self._num_classes]
        if self._is_empty:
            self.weight[self._num_classes :] = 0
        if total.dtype == left.dtype:
            torch.addmm(total, left, right, beta=0 if self._is_empty else 1, out=total)
        elif widens_products(left, total.dtype):
            add = 0 if self._is_empty else 1
            torch.addmm(total, left, right, out_dtype=total.dtype, beta=add, out=total)
        else:
            self._add_rows(total, left, right)

    def _add_rows(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds a product to a sum of a wider type, some rows at a time."""
        for rows in slices(len(total), max(1, ADDED_ELEMENTS // total.shape[1])):
            if self._is_empty:
                total[rows] = left[rows] @ right
            else:
                total[rows].add_(left[rows] @ right)

    def scale(self, factors: Tensor) -> None:
        """Scales the gradients in place.

        Args:
            factors: of the items, all equal, ``[N]``.
        """
        if self.features is not None:
            self.features.mul_(factors[:, None])
        for total in (self.weight, self.bias):
            if total is not None and len(factors):
                total.mul_(factors[0])


class _GivenGradients(torch.autograd.Function):
    """A loss per item whose gradients on features, weight and bias are known; backward uses the gradients up."""

    @staticmethod
    def forward(ctx, features, weight, bias, loss, gradients, weighted):
        ctx.gradients, ctx.weighted = gradients, weighted
        ctx.dtypes = [None if value is None else value.dtype for value in (features, weight, bias)]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None
        check_first_backward(gradients)
        weighted, ctx.weighted = ctx.weighted, None
        if _are_equal(grad):
            gradients.scale(grad)
        else:
            del gradients  # the new ones are computed without these in memory
            gradients = weighted(grad)
        found = zip((gradients.features, gradients.weight, gradients.bias), ctx.dtypes, strict=True)
        return *(None if value is None else value.to(dtype) for value, dtype in found), None, None, None


def _product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Writes a product of matrices, rounded once where the device can."""
    if widens_products(left, out.dtype):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif left.device.type != "cpu" and left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _sum_type(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _are_equal(factors: Tensor) -> bool:
    """Returns True if all items count equally; waits for an accelerator if the loss was not simply summed."""
    return len(factors) < 2 or factors.stride(0) == 0 or bool((factors == factors[0]).all())
