"""Triton kernels: the classes of contributions to a gradient, and the sample of the classes that update the head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import unit_columns

# Contributions of a program, and classes that the programs which see all classes read at a time.
BLOCK, BLOCK_CLASSES = 256, 4096


@triton.jit
def first_kernel(in_order, out, number, BLOCK: tl.constexpr):
    """A program marks contributions whose class differs from the one before."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(in_order + place, place < number, -1)
    before = tl.load(in_order + place - 1, (place > 0) & (place < number), -1)
    tl.store(out + place, ((place == 0) | (here != before)).to(tl.int32), place < number)


@triton.jit
def starts_kernel(count, out, number, BLOCK: tl.constexpr):
    """A program writes the starts of classes, and P for classes that there are not."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(count + place, place < number, 0)
    before = tl.load(count + place - 1, (place > 0) & (place < number), 0)
    tl.store(out + here - 1, place, (place < number) & (here != before))
    last = tl.load(count + number - 1)
    tl.store(out + place, tl.zeros((BLOCK,), tl.int64) + number, (place >= last) & (place <= number))


@triton.jit
def contributions_kernel(
    order,
    item_grad,
    lengths,
    which,
    scales,
    sizes,
    number,
    num_items,
    num_columns,
    stride,
    HAS_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program finds vector and factor of BLOCK sorted contributions."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = place < number
    former = tl.load(order + place, used, 0)
    num_alone = (tl.full((), 0, tl.int64) + num_items) * num_columns
    is_alone = former < num_alone
    item = former // num_columns
    column = former - item * num_columns
    scale = tl.load(item_grad + item * stride + column, used & is_alone, 0).to(scales.dtype.element_ty)
    scale = tl.where(is_alone, scale, 1.0)
    vector = tl.where(is_alone, item, num_items + former - num_alone)
    tl.store(which + place, vector, used)
    tl.store(scales + place, scale, used)
    if HAS_LENGTHS:
        length = tl.load(lengths + vector, used, 0).to(scales.dtype.element_ty)
        tl.store(sizes + place, tl.abs(scale) * length, used)


@triton.jit
def class_sizes_kernel(sizes, starts, out, number, BLOCK: tl.constexpr):
    """A program sums the sizes of the contributions to BLOCK classes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(starts + row, row < number, 0)
    last = tl.load(starts + row + 1, row < number, 0)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for step in range(0, tl.max(last - first, 0)):
        total += tl.load(sizes + first + step, first + step < last, 0)
    tl.store(out + row, total, row < number)


@triton.jit
def class_inclusion_kernel(
    sizes, count, inclusion, passed, number, wanted, start: tl.float64, tiny: tl.float64,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The one program computes π of all classes, and the points that the running sum has passed."""
    dtype: tl.constexpr = inclusion.dtype.element_ty
    num_classes = tl.load(count + number - 1)
    scale = tl.full((), 0, dtype)
    for _ in range(STEPS + 1):  # the first pass caps no class
        total = tl.full((), 0, dtype)
        capped = tl.full((), 0, tl.int64)
        for first in range(0, number, BLOCK):
            row = first + tl.arange(0, BLOCK)
            size = tl.maximum(tl.load(sizes + row, row < num_classes, 0).to(dtype), tl.cast(tiny, dtype))
            is_free = scale * size < 1
            total += tl.sum(tl.where(is_free & (row < num_classes), size, 0.0), 0)
            capped += tl.sum(((row < num_classes) & (is_free == 0)).to(tl.int64), 0)
        scale = (wanted - capped).to(dtype) / total
    sum_before = tl.full((), 0, dtype)
    for first in range(0, number, BLOCK):
        row = first + tl.arange(0, BLOCK)
        size = tl.maximum(tl.load(sizes + row, row < num_classes, 0).to(dtype), tl.cast(tiny, dtype))
        chance = tl.where(num_classes <= wanted, 1.0, tl.minimum(scale * size, 1.0))
        chance = tl.where(row < num_classes, chance, 0.0)
        cumulative = sum_before + tl.cumsum(chance, 0)
        tl.store(inclusion + row, chance, row < number)
        points = tl.floor(cumulative + tl.cast(start, dtype))
        tl.store(passed + row, tl.where(num_classes <= wanted, (row + 1).to(dtype), points), row < number)
        sum_before += tl.sum(chance, 0)


@triton.jit
def kept_kernel(
    inclusion, passed, count, starts, in_order, classes, ids, weights, num_kept, number, BLOCK: tl.constexpr
):
    """The one program lists the classes whose stretch of the running sum holds a point."""
    num_classes = tl.load(count + number - 1)
    before = tl.full((), 0, tl.int64)
    for first in range(0, number, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        here = tl.load(passed + row, row < num_classes, 0)
        last = tl.load(passed + row - 1, (row > 0) & (row < num_classes), 0)
        is_kept = (row < num_classes) & (here != last)
        place = before + tl.cumsum(is_kept.to(tl.int64), 0) - 1
        tl.store(classes + place, row, is_kept)
        first_of_row = tl.load(starts + row, is_kept, 0)
        tl.store(ids + place, tl.load(in_order + first_of_row, is_kept, 0), is_kept)
        weight = 1 / tl.load(inclusion + row, is_kept, 1)
        tl.store(weights + place, weight.to(weights.dtype.element_ty), is_kept)
        before += tl.sum(is_kept.to(tl.int64), 0)
    tl.store(num_kept, before)


@torch.library.custom_op("hf_dis::is_first", mutates_args=())
def is_first(in_order: Tensor) -> Tensor:
    """Marks by 1 the first of each run of equal ids, int32, ``[P]``."""
    out = torch.empty_like(in_order, dtype=torch.int32)
    with torch.cuda.device_of(in_order):
        first_kernel[(triton.cdiv(len(in_order), BLOCK),)](in_order, out, len(in_order), BLOCK=BLOCK)
    return out


@is_first.register_fake
def _(in_order):
    return torch.empty_like(in_order, dtype=torch.int32)


@torch.library.custom_op("hf_dis::class_starts", mutates_args=())
def class_starts(count: Tensor) -> Tensor:
    """Finds the first contribution of each class: ``[P + 1]``, with P from the number of classes on.

    Args:
        count: the number of classes up to each sorted contribution, int64, ``[P]``, P above 0.
    """
    number = len(count)
    out = count.new_empty(number + 1)
    with torch.cuda.device_of(count):
        starts_kernel[(triton.cdiv(number + 1, BLOCK),)](count, out, number, BLOCK=BLOCK)
    return out


@class_starts.register_fake
def _(count):
    return count.new_empty(len(count) + 1)


@torch.library.custom_op("hf_dis::sorted_contributions", mutates_args=())
def sorted_contributions(
    order: Tensor, item_grad: Tensor, lengths: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds what each contribution to a head's gradient is made of, in the order of the classes.

    Args:
        order: the contributions' places before the sort, ``[P]``: first those of each item's own classes, then one of
            each class of a tail.
        item_grad: the gradient on the products of items with their own classes, ``[N, R]``.
        lengths: of the vectors, ``[V]``; None: sizes are not wanted.
        wide: the type of factors and sizes.

    Returns:
        the vector, its factor, and the size, ``[P]`` each; without lengths the size is empty.
    """
    item_grad = unit_columns(item_grad)
    which, scales, sizes = _contributions(order, lengths, wide)
    numbers = len(order), *item_grad.shape, item_grad.stride(0)
    with torch.cuda.device_of(order):
        contributions_kernel[(triton.cdiv(len(order), BLOCK),)](
            order,
            item_grad,
            lengths,
            which,
            scales,
            sizes,
            *numbers,
            HAS_LENGTHS=lengths is not None,
            BLOCK=BLOCK,
        )
    return which, scales, sizes


@sorted_contributions.register_fake
def _(order, item_grad, lengths, wide):
    return _contributions(order, lengths, wide)


def _contributions(order: Tensor, lengths: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    scales = torch.empty_like(order, dtype=wide)
    return torch.empty_like(order), scales, scales.new_empty(0 if lengths is None else len(order))


@torch.library.custom_op("hf_dis::class_sizes", mutates_args=())
def class_sizes(sizes: Tensor, starts: Tensor) -> Tensor:
    """Sums the sizes of the contributions to each class, ``[P]``, 0 beyond the classes.

    Args:
        sizes: of the sorted contributions, ``[P]``.
        starts: of :func:`class_starts`.
    """
    out = torch.empty_like(sizes)
    with torch.cuda.device_of(sizes):
        class_sizes_kernel[(triton.cdiv(len(sizes), BLOCK),)](sizes, starts, out, len(sizes), BLOCK=BLOCK)
    return out


@class_sizes.register_fake
def _(sizes, starts):
    return torch.empty_like(sizes)


@torch.library.custom_op("hf_dis::class_inclusion", mutates_args=())
def class_inclusion(
    sizes: Tensor, count: Tensor, wanted: int, start: float, steps: int, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes π of the classes that update the head, as :class:`hf_dis.sampling.designs.Updates` does.

    Args:
        sizes: of :func:`class_sizes`.
        count: as for :func:`class_starts`.
        wanted, start: of the sample.
        steps: towards π.
        wide: the type of the result.

    Returns:
        π, and the points that the running sum has passed, ``[P]`` each.
    """
    inclusion, passed = (torch.empty_like(sizes, dtype=wide) for _ in range(2))
    tiny = torch.finfo(sizes.dtype).tiny
    with torch.cuda.device_of(sizes):
        class_inclusion_kernel[(1,)](
            sizes, count, inclusion, passed, len(sizes), wanted, start, tiny, STEPS=steps, BLOCK=BLOCK_CLASSES
        )
    return inclusion, passed


@class_inclusion.register_fake
def _(sizes, count, wanted, start, steps, wide):
    return tuple(torch.empty_like(sizes, dtype=wide) for _ in range(2))


@torch.library.custom_op("hf_dis::kept_classes", mutates_args=())
def kept_classes(
    inclusion: Tensor, passed: Tensor, count: Tensor, starts: Tensor, in_order: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists the classes that are kept, first to last, with their weights 1/π.

    Args:
        inclusion, passed: of :func:`class_inclusion`.
        count: as for :func:`class_starts`.
        starts: of :func:`class_starts`.
        in_order: the class of each sorted contribution, ``[P]``.

    Returns:
        the places of the kept classes among all, the classes themselves and their weights, ``[P]`` each; and the
        number of the kept classes, ``[1]``. Beyond this number the entries are unset.
    """
    results = _kept(inclusion, count)
    with torch.cuda.device_of(inclusion):
        kept_kernel[(1,)](inclusion, passed, count, starts, in_order, *results, len(inclusion), BLOCK=BLOCK_CLASSES)
    return results


@kept_classes.register_fake
def _(inclusion, passed, count, starts, in_order):
    return _kept(inclusion, count)


def _kept(inclusion: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(count), torch.empty_like(count), torch.empty_like(inclusion), count.new_empty(1)
