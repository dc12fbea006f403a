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
def _added(total, vectors, which, scales, first, last, place, inside, stride, BLOCK: tl.constexpr):
    """Adds the contributions first..last-1 to a total."""
    for start in range(first, last, BLOCK):
        number = start + tl.arange(0, BLOCK)
        used = number < last
        scale = tl.load(scales + number, used, 0).to(total.dtype)
        vector = tl.load(which + number, used, 0).to(tl.int64)
        places = vectors + (vector * stride)[:, None] + place[None, :]
        values = tl.load(places, used[:, None] & inside[None, :], 0).to(total.dtype)
        total += tl.sum(values * scale[:, None], 0)
    return total


@triton.jit
def pieces_kernel(
    vectors,
    which,
    scales,
    starts,
    out,
    num_segments,
    width,
    stride,
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
        total = _added(total, vectors, which, scales, first, first + PIECE, place, inside, stride, BLOCK)
        tl.store(out + piece * width + place, total, inside)


@triton.jit
def segments_kernel(
    vectors,
    which,
    scales,
    starts,
    pieces,
    kept,
    weights,
    out,
    width,
    stride,
    HAS_KEPT: tl.constexpr,
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
    total = _added(total, vectors, which, scales, first, whole_first, place, inside, stride, BLOCK)
    for piece in range(whole_first // PIECE, whole_last // PIECE):
        total += tl.load(pieces + piece * width + place, inside, 0)
    total = _added(total, vectors, which, scales, whole_last, last, place, inside, stride, BLOCK)
    if HAS_KEPT:
        total *= tl.load(weights + row).to(total.dtype)
    tl.store(out + row * width + place, total, inside)


@torch.library.custom_op("hf_dis::segment_pieces", mutates_args=())
def segment_pieces(vectors: Tensor, which: Tensor, scales: Tensor, starts: Tensor) -> Tensor:
    """Sums each piece of 64 contributions that lies in one segment; takes the arguments of :func:`segment_rows`.

    Returns:
        ``[P // 64, d]``, float32 or wider; a piece of several segments is left unset.
    """
    width, num_pieces = vectors.shape[1], len(which) // PIECE
    out = vectors.new_empty(num_pieces, width, dtype=sum_dtype(vectors, scales))
    _launch(pieces_kernel, num_pieces, vectors, which, scales, starts, out, len(starts) - 1)
    return out


@segment_pieces.register_fake
def _(vectors, which, scales, starts):
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
) -> Tensor:
    """Sums each segment from its pieces and the contributions beside them; see :func:`segment_rows`."""
    out = _rows(vectors, starts, dtype, kept)
    given = vectors, which, scales, starts, pieces, kept, weights, out
    _launch(segments_kernel, len(out), *given, HAS_KEPT=kept is not None)
    return out


@join_pieces.register_fake
def _(vectors, which, scales, starts, pieces, dtype, kept=None, weights=None):
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

    Returns:
        ``[U, d]``, or ``[k, d]``.
    """
    pieces = segment_pieces(vectors, which, scales, starts)
    return join_pieces(vectors, which, scales, starts, pieces, dtype, kept, weights)


def _launch(
    kernel: Any,
    programs: int,
    vectors: Tensor,
    which: Tensor,
    scales: Tensor,
    starts: Tensor,
    *others: Tensor | int | None,
    **flags: bool,
) -> None:
    """Runs a kernel by a number of programs for each block of columns, with the arguments that the kernels share."""
    vectors = unit_columns(vectors)
    width = vectors.shape[1]
    block = block_size(width, 512)
    with torch.cuda.device_of(vectors):
        kernel[programs, triton.cdiv(width, block)](
            vectors,
            which,
            scales,
            starts,
            *others,
            width,
            vectors.stride(0),
            PIECE=PIECE,
            BLOCK=4,
            BLOCK_WIDTH=block,
            **flags,
        )
