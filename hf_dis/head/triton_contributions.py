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
def starts_kernel(in_order, count, starts, number, BLOCK: tl.constexpr):
    """The one program numbers the classes of sorted contributions, and lists their starts."""
    before = tl.full((), 0, tl.int64)
    for first in range(0, number, BLOCK):
        place = first + tl.arange(0, BLOCK).to(tl.int64)
        here = tl.load(in_order + place, place < number, -1)
        last = tl.load(in_order + place - 1, (place > 0) & (place < number), -1)
        is_first = (place < number) & ((place == 0) | (here != last))
        up_to = before + tl.cumsum(is_first.to(tl.int64), 0)
        tl.store(count + place, up_to, place < number)
        tl.store(starts + up_to - 1, place, is_first)
        before += tl.sum(is_first.to(tl.int64), 0)
    for first in range(0, number + 1, BLOCK):
        place = first + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(starts + place, tl.zeros((BLOCK,), tl.int64) + number, (place >= before) & (place <= number))


@triton.jit
def lengths_kernel(
    vectors,
    others,
    out,
    num_vectors,
    num_rows,
    width,
    stride,
    others_stride,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A program computes the lengths of BLOCK vectors."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_other = row >= num_vectors
    first = tl.where(is_other, 0, row * stride)
    first_of_other = tl.where(is_other, (row - num_vectors) * others_stride, 0)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        used = ((row < num_rows)[:, None]) & (column < width)[None, :]
        mine = tl.load(vectors + first[:, None] + column[None, :], used & (is_other == 0)[:, None], 0)
        of_other = tl.load(others + first_of_other[:, None] + column[None, :], used & is_other[:, None], 0)
        value = mine.to(total.dtype) + of_other.to(total.dtype)  # one of them is 0
        total += tl.sum(value * value, 1)
    tl.store(out + row, tl.sqrt(total), row < num_rows)


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
def kept_kernel(
    sizes, count, starts, in_order, inclusion, passed, classes, ids, weights, num_kept,
    number, wanted, start: tl.float64, tiny: tl.float64, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The one program computes π of all classes, and lists those whose stretch of the running sum holds a point."""
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
    tl.debug_barrier()  # a thread reads points that another thread has written
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


@torch.library.custom_op("hf_dis::class_starts", mutates_args=())
def class_starts(in_order: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers the classes of sorted contributions, and finds their starts.

    Args:
        in_order: the class of each contribution, ascending, int64, ``[P]``.

    Returns:
        the number of classes up to each contribution, ``[P]``; and the first contribution of each class, with P from
        the number of classes on, ``[P + 1]``.
    """
    count, starts = _starts(in_order)
    with torch.cuda.device_of(in_order):
        starts_kernel[(1,)](in_order, count, starts, len(in_order), BLOCK=BLOCK_CLASSES)
    return count, starts


@class_starts.register_fake
def _(in_order):
    return _starts(in_order)


def _starts(in_order: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(in_order), in_order.new_empty(len(in_order) + 1)


@torch.library.custom_op("hf_dis::vector_lengths", mutates_args=())
def vector_lengths(vectors: Tensor, others: Tensor, wide: torch.dtype) -> Tensor:
    """Computes the lengths of the rows of two matrices, one after the other: ``[N + M]``.

    Args:
        vectors, others: ``[N, d]`` and ``[M, d]``.
        wide: the type of the sums.
    """
    vectors, others = unit_columns(vectors), unit_columns(others)
    out = _lengths(vectors, others, wide)
    sizes = len(vectors), len(out), vectors.shape[1], vectors.stride(0), others.stride(0)
    with torch.cuda.device_of(vectors):
        lengths_kernel[(triton.cdiv(len(out), 4),)](vectors, others, out, *sizes, BLOCK=4, BLOCK_WIDTH=512)
    return out


@vector_lengths.register_fake
def _(vectors, others, wide):
    return _lengths(vectors, others, wide)


def _lengths(vectors: Tensor, others: Tensor, wide: torch.dtype) -> Tensor:
    return vectors.new_empty(len(vectors) + len(others), dtype=wide)


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
        starts: of :func:`class_starts`, ``[P + 1]``.
    """
    out = torch.empty_like(sizes)
    with torch.cuda.device_of(sizes):
        class_sizes_kernel[(triton.cdiv(len(sizes), BLOCK),)](sizes, starts, out, len(sizes), BLOCK=BLOCK)
    return out


@class_sizes.register_fake
def _(sizes, starts):
    return torch.empty_like(sizes)


@torch.library.custom_op("hf_dis::kept_classes", mutates_args=())
def kept_classes(
    sizes: Tensor,
    count: Tensor,
    starts: Tensor,
    in_order: Tensor,
    wanted: int,
    start: float,
    steps: int,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples the classes that update the head, as :class:`hf_dis.sampling.designs.Updates` does.

    Args:
        sizes: of :func:`class_sizes`.
        count, starts: of :func:`class_starts`.
        in_order: the class of each sorted contribution, ``[P]``.
        wanted, start: of the sample.
        steps: towards π.
        wide: the type of π.

    Returns:
        the places of the kept classes among all, the classes themselves and their weights 1/π, first to last, ``[P]``
        each; and the number of the kept classes, ``[1]``. Beyond this number the entries are unset.
    """
    results = _kept(count, wide)
    inclusion, passed = (torch.empty_like(sizes, dtype=wide) for _ in range(2))
    numbers = len(sizes), wanted, start, torch.finfo(sizes.dtype).tiny
    with torch.cuda.device_of(sizes):
        kept_kernel[(1,)](
            sizes, count, starts, in_order, inclusion, passed, *results, *numbers, STEPS=steps, BLOCK=BLOCK_CLASSES
        )
    return results


@kept_classes.register_fake
def _(sizes, count, starts, in_order, wanted, start, steps, wide):
    return _kept(count, wide)


def _kept(count: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    places = torch.empty_like(count)
    return places, torch.empty_like(count), torch.empty_like(count, dtype=wide), count.new_empty(1)
