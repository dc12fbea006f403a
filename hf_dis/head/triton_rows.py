"""Triton kernels: sums of contributions to the rows of a gradient.

No sum uses atomic additions: the order of additions, and so the result, depends on the arguments alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, sum_dtype, unit_columns

# Contributions that a program adds one after the other. A class with more is summed from the sums of such pieces.
PIECE = 64


@triton.jit
def _added(
    total, vectors, others, which, scales, first, last, place, inside, num_vectors, stride, others_stride,
    HAS_OTHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the contributions first..last-1 to a total."""
    for start in range(first, last, BLOCK):
        number = start + tl.arange(0, BLOCK)
        used = number < last
        scale = tl.load(scales + number, used, 0).to(total.dtype)
        vector = tl.load(which + number, used, 0).to(tl.int64)
        places = vectors + (vector * stride)[:, None] + place[None, :]
        is_first = used & (vector < num_vectors)
        values = tl.load(places, is_first[:, None] & inside[None, :], 0).to(total.dtype)
        if HAS_OTHERS:
            places = others + ((vector - num_vectors) * others_stride)[:, None] + place[None, :]
            is_other = used & (vector >= num_vectors)
            values += tl.load(places, is_other[:, None] & inside[None, :], 0).to(total.dtype)
        total += tl.sum(values * scale[:, None], 0)
    return total


@triton.jit
def pieces_kernel(
    vectors,
    others,
    which,
    scales,
    starts,
    out,
    num_segments,
    width,
    num_vectors,
    stride,
    others_stride,
    HAS_OTHERS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A program sums a piece of PIECE contributions if they belong to one segment; other pieces stay unset."""
    piece = tl.program_id(0).to(tl.int64)
    first = piece * PIECE
    low = tl.full((), 0, tl.int64)
    high = low + num_segments
    while high - low > 1:  # starts[low] <= first < starts[high]
        middle = (low + high) // 2
        is_before = tl.load(starts + middle) <= first
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    if tl.load(starts + low + 1) >= first + PIECE:
        place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        inside = place < width
        total = tl.zeros((BLOCK_WIDTH,), out.dtype.element_ty)
        total = _added(
            total, vectors, others, which, scales, first, first + PIECE, place, inside,
            num_vectors, stride, others_stride, HAS_OTHERS, BLOCK,
        )  # fmt: skip
        tl.store(out + piece * width + place, total, inside)


@triton.jit
def segments_kernel(
    vectors,
    others,
    which,
    scales,
    starts,
    pieces,
    kept,
    weights,
    out,
    width,
    num_vectors,
    stride,
    others_stride,
    HAS_KEPT: tl.constexpr,
    HAS_OTHERS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A program sums a segment: its whole pieces, and the contributions before and after them."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.load(kept + row) if HAS_KEPT else row
    place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = place < width
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    whole_first = tl.minimum(tl.cdiv(first, PIECE) * PIECE, last)
    whole_last = tl.maximum(last // PIECE * PIECE, whole_first)
    total = tl.zeros((BLOCK_WIDTH,), pieces.dtype.element_ty)
    total = _added(
        total, vectors, others, which, scales, first, whole_first, place, inside,
        num_vectors, stride, others_stride, HAS_OTHERS, BLOCK,
    )  # fmt: skip
    for piece in range(whole_first // PIECE, whole_last // PIECE):
        total += tl.load(pieces + piece * width + place, inside, 0)
    total = _added(
        total, vectors, others, which, scales, whole_last, last, place, inside,
        num_vectors, stride, others_stride, HAS_OTHERS, BLOCK,
    )  # fmt: skip
    if HAS_KEPT:
        total *= tl.load(weights + row).to(total.dtype)
    tl.store(out + row * width + place, total, inside)


@torch.library.custom_op("hf_dis::segment_pieces", mutates_args=())
def segment_pieces(
    vectors: Tensor, which: Tensor, scales: Tensor, starts: Tensor, others: Tensor | None = None
) -> Tensor:
    """Sums each piece of 64 contributions that lies in one segment; takes the arguments of :func:`segment_rows`.

    Returns:
        ``[P // 64, d]``, float32 or wider; a piece of several segments is left unset.
    """
    width, num_pieces = vectors.shape[1], len(which) // PIECE
    out = vectors.new_empty(num_pieces, width, dtype=sum_dtype(vectors, scales))
    _launch(pieces_kernel, num_pieces, vectors, others, which, scales, starts, out, len(starts) - 1)
    return out


@segment_pieces.register_fake
def _(vectors, which, scales, starts, others=None):
    return vectors.new_empty(len(which) // PIECE, vectors.shape[1], dtype=sum_dtype(vectors, scales))


@torch.library.custom_op("hf_dis::join_pieces", mutates_args=())
def join_pieces(
    vectors: Tensor,
    which: Tensor,
    scales: Tensor,
    starts: Tensor,
    pieces: Tensor,
    dtype: torch.dtype,
    kept: Tensor | None = None,
    weights: Tensor | None = None,
    others: Tensor | None = None,
) -> Tensor:
    """Sums each segment from its pieces and the contributions beside them; see :func:`segment_rows`."""
    out = _rows(vectors, starts, dtype, kept)
    given = vectors, others, which, scales, starts, pieces, kept, weights, out
    _launch(segments_kernel, len(out), *given, HAS_KEPT=kept is not None)
    return out


@join_pieces.register_fake
def _(vectors, which, scales, starts, pieces, dtype, kept=None, weights=None, others=None):
    return _rows(vectors, starts, dtype, kept)


def _rows(vectors: Tensor, starts: Tensor, dtype: torch.dtype, kept: Tensor | None) -> Tensor:
    return vectors.new_empty(len(starts) - 1 if kept is None else len(kept), vectors.shape[1], dtype=dtype)


def segment_rows(
    vectors: Tensor,
    which: Tensor,
    scales: Tensor,
    starts: Tensor,
    dtype: torch.dtype,
    kept: Tensor | None = None,
    weights: Tensor | None = None,
    others: Tensor | None = None,
) -> Tensor:
    """Sums scale · vector over the contributions of each segment, in float32 or wider, and in a fixed order.

    Args:
        vectors: ``[V, d]``.
        which: the vector of each contribution, by segment, int64, ``[P]``.
        scales: the factor of the vector, ``[P]``.
        starts: the first contribution of each segment, then P, int64, ``[U + 1]``. A segment may be empty.
        dtype: of the result.
        kept: the segments that are wanted, int64, ``[k]``; None: all of them.
        weights: the factor of each of these segments, ``[k]``; needed with ``kept``.
        others: further vectors, ``[W, d]``; their numbers follow those of ``vectors``, which are not copied.

    Returns:
        ``[U, d]``, or ``[k, d]``.
    """
    pieces = segment_pieces(vectors, which, scales, starts, others)
    return join_pieces(vectors, which, scales, starts, pieces, dtype, kept, weights, others)


def _launch(
    kernel: Any,
    programs: int,
    vectors: Tensor,
    others: Tensor | None,
    which: Tensor,
    scales: Tensor,
    starts: Tensor,
    *rest: Tensor | int | None,
    **flags: bool,
) -> None:
    """Runs a kernel by a number of programs for each block of columns, with the arguments that the kernels share."""
    vectors, others = unit_columns(vectors), None if others is None else unit_columns(others)
    width = vectors.shape[1]
    block = block_size(width, 512)
    with torch.cuda.device_of(vectors):
        kernel[programs, triton.cdiv(width, block)](
            vectors,
            others,
            which,
            scales,
            starts,
            *rest,
            width,
            len(vectors),
            vectors.stride(0),
            0 if others is None else others.stride(0),
            HAS_OTHERS=others is not None,
            PIECE=PIECE,
            BLOCK=4,
            BLOCK_WIDTH=block,
            **flags,
        )
