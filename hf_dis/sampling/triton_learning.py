"""Triton kernels: the statistics that a proposal learns from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, unit_columns

# Items that a program sums ranks of; the sums of the programs are added by torch.
ITEMS = 64


@triton.jit
def finite_items_kernel(signal, log_weights, out, width, signal_stride, log_weights_stride, BLOCK: tl.constexpr):
    """A program looks at the columns that an item uses."""
    item = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = tl.float64 if signal.dtype.element_ty == tl.float64 else tl.float32
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        log_weight = tl.load(log_weights + item * log_weights_stride + column, column < width, float("-inf"))
        value = tl.load(signal + item * signal_stride + column, column < width, 0).to(wide)
        is_bad = (tl.abs(value) == float("inf")) | (value != value)
        bad += (is_bad & (log_weight != float("-inf"))).to(tl.int32)
    tl.store(out + item, (tl.sum(bad, 0) == 0).to(tl.uint8))


@triton.jit
def rank_sums_kernel(
    signal,
    weights,
    ranks,
    finite,
    edges,
    out,
    num_items,
    num_ranks,
    num_bins,
    signal_stride,
    weights_stride,
    ranks_stride,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
):
    """A program sums the weighted squares of ITEMS items in each bin of ranks."""
    dtype: tl.constexpr = out.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    bin = tl.arange(0, BLOCK_BINS)
    low = tl.load(edges + bin, bin < num_bins, 0)[:, None]
    high = tl.load(edges + bin + 1, bin < num_bins, 0)[:, None]
    total = tl.zeros((BLOCK_BINS,), dtype)
    for number in range(0, ITEMS):
        item = program * ITEMS + number
        exists = item < num_items
        is_finite = tl.load(finite + item, exists, 0) != 0
        for start in range(0, num_ranks, BLOCK):
            column = start + tl.arange(0, BLOCK)
            used = (column < num_ranks) & is_finite
            value = tl.load(signal + item * signal_stride + column, used, 0).to(dtype)
            weight = tl.load(weights + item * weights_stride + column, used, 0).to(dtype)
            rank = tl.load(ranks + item * ranks_stride + column, used, -1)[None, :]
            total += tl.sum(tl.where((rank >= low) & (rank < high), (value * value * weight)[None, :], 0.0), 1)
    tl.store(out + program * num_bins + bin, total, bin < num_bins)


@triton.jit
def tail_sums_kernel(
    signal, outside_top, held_ids, tail_ids, finite, out,
    num_items, num_shared, num_tails, num_held, signal_stride, met_stride,
    BLOCK_ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program sums squares and items of BLOCK columns over the items of a tail.

    The columns that an item counts are marked, or are those that its held classes lack.
    """
    tail = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), out.dtype.element_ty)
    items = tl.zeros((BLOCK,), out.dtype.element_ty)
    if tail_ids is not None:
        own = tl.load(tail_ids + tail * num_shared + column, column < num_shared, -1)
    for start in range(0, tl.cdiv(num_items, num_tails), BLOCK_ITEMS):
        item = tail + (start + tl.arange(0, BLOCK_ITEMS)).to(tl.int64) * num_tails
        is_finite = tl.load(finite + item, item < num_items, 0) != 0
        used = is_finite[:, None] & (column < num_shared)[None, :]
        if tail_ids is None:
            met = tl.load(outside_top + (item * met_stride)[:, None] + column[None, :], used, 0) != 0
        else:
            met = used
            for rank in range(0, num_held):
                held = tl.load(held_ids + item * met_stride + rank, is_finite, -1)
                met = met & (held[:, None] != own[None, :])
        value = tl.load(signal + (item * signal_stride)[:, None] + column[None, :], met, 0).to(squares.dtype)
        squares += tl.sum(value * value, 0)
        items += tl.sum(met.to(items.dtype), 0)
    place = out + (tail * num_shared + column) * 2
    tl.store(place, squares, column < num_shared)
    tl.store(place + 1, items, column < num_shared)


@triton.jit
def item_counts_kernel(finite, out, num_items, BLOCK: tl.constexpr):
    """The one program counts the items that are finite, and those that are not."""
    found = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, num_items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        found += (tl.load(finite + item, item < num_items, 0) != 0).to(tl.int64)
    number = tl.sum(found, 0)
    tl.store(out, number)
    tl.store(out + 1, num_items - number)


@torch.library.custom_op("hf_dis::finite_items", mutates_args=())
def finite_items(signal: Tensor, log_weights: Tensor) -> Tensor:
    """Tells the items whose signal is finite at every column that they use.

    Args:
        signal, log_weights: ``[N, R]`` each; a log-weight of -inf marks a column that is not used.

    Returns:
        bool, ``[N]``.
    """
    signal, log_weights = unit_columns(signal), unit_columns(log_weights)
    out = signal.new_empty(len(signal), dtype=torch.bool)
    strides = signal.stride(0), log_weights.stride(0)
    with torch.cuda.device_of(signal):
        finite_items_kernel[(len(signal),)](
            signal, log_weights, out.view(torch.uint8), signal.shape[1], *strides, BLOCK=1024
        )
    return out


@finite_items.register_fake
def _(signal, log_weights):
    return signal.new_empty(len(signal), dtype=torch.bool)


@torch.library.custom_op("hf_dis::rank_sums", mutates_args=())
def rank_sums(
    signal: Tensor, weights: Tensor, ranks: Tensor, finite: Tensor, edges: Tensor, dtype: torch.dtype
) -> Tensor:
    """Sums the weighted squares of the signal in each bin of ranks, by parts of 64 items.

    Args:
        signal: ``[N, R]``, R at least K.
        weights, ranks: of the first K columns, ``[N, K]``.
        finite: the items to sum, bool, ``[N]``.
        edges: of the bins, ascending, int64, ``[bins + 1]``.
        dtype: of the sums.

    Returns:
        ``[ceil(N / 64), bins]``.
    """
    signal, weights, ranks = unit_columns(signal), unit_columns(weights), unit_columns(ranks)
    out = _rank_sums(signal, edges, dtype)
    sizes = len(signal), ranks.shape[1], len(edges) - 1
    strides = signal.stride(0), weights.stride(0), ranks.stride(0)
    blocks = {"BLOCK": block_size(ranks.shape[1], 128), "BLOCK_BINS": block_size(len(edges) - 1, 2**10)}
    with torch.cuda.device_of(signal):
        rank_sums_kernel[(len(out),)](
            signal, weights, ranks, finite.view(torch.uint8), edges, out, *sizes, *strides, ITEMS=ITEMS, **blocks
        )
    return out


@rank_sums.register_fake
def _(signal, weights, ranks, finite, edges, dtype):
    return _rank_sums(signal, edges, dtype)


def _rank_sums(signal: Tensor, edges: Tensor, dtype: torch.dtype) -> Tensor:
    return signal.new_empty(-(-len(signal) // ITEMS), len(edges) - 1, dtype=dtype)


@torch.library.custom_op("hf_dis::tail_sums", mutates_args=())
def tail_sums(signal: Tensor, outside_top: Tensor, finite: Tensor, num_tails: int) -> Tensor:
    """Sums over the items of each tail, as :meth:`hf_dis.sampling.sample.ClassSample.tail_sums` does.

    Args:
        signal: at the columns of the tail, ``[N, K_t]``.
        outside_top: the columns that an item counts, bool, ``[N, K_t]``.
        finite: the items to sum, bool, ``[N]``.
        num_tails: G; item i uses tail ``i mod G``.

    Returns:
        sum of the squares, and number of items, float32, ``[G·K_t, 2]``.
    """
    outside_top = unit_columns(outside_top.view(torch.uint8))
    return _summed(signal, outside_top, None, None, finite, num_tails, 0, outside_top.stride(0))


@tail_sums.register_fake
def _(signal, outside_top, finite, num_tails):
    return _tail_sums(signal, num_tails)


@torch.library.custom_op("hf_dis::tail_sums_outside", mutates_args=())
def tail_sums_outside(signal: Tensor, held_ids: Tensor, tail_ids: Tensor, finite: Tensor) -> Tensor:
    """Sums as :func:`tail_sums` at the columns whose classes are not among those of the item.

    Args:
        signal: at the columns of the tail, ``[N, K_t]``.
        held_ids: classes of each item, ``[N, m]``.
        tail_ids: classes of each tail, ``[G, K_t]``.
        finite: the items to sum, bool, ``[N]``.
    """
    held_ids = unit_columns(held_ids)
    given = None, held_ids, tail_ids.contiguous(), finite
    return _summed(signal, *given, len(tail_ids), held_ids.shape[1], held_ids.stride(0))


@tail_sums_outside.register_fake
def _(signal, held_ids, tail_ids, finite):
    return _tail_sums(signal, len(tail_ids))


def _summed(
    signal: Tensor,
    outside_top: Tensor | None,
    held_ids: Tensor | None,
    tail_ids: Tensor | None,
    finite: Tensor,
    num_tails: int,
    num_held: int,
    met_stride: int,
) -> Tensor:
    signal = unit_columns(signal)
    out, (num_items, num_shared) = _tail_sums(signal, num_tails), signal.shape
    sizes = num_items, num_shared, num_tails, num_held, signal.stride(0), met_stride
    given = outside_top, held_ids, tail_ids, finite.view(torch.uint8)
    with torch.cuda.device_of(signal):
        tail_sums_kernel[num_tails, triton.cdiv(num_shared, 32)](signal, *given, out, *sizes, BLOCK_ITEMS=32, BLOCK=32)
    return out


def _tail_sums(signal: Tensor, num_tails: int) -> Tensor:
    return signal.new_empty(num_tails * signal.shape[1], 2, dtype=torch.float32)


@torch.library.custom_op("hf_dis::item_counts", mutates_args=())
def item_counts(finite: Tensor) -> Tensor:
    """Counts the items with and without a finite signal: int64, ``[2]``, for bool ``[N]``."""
    out = finite.new_empty(2, dtype=torch.long)
    with torch.cuda.device_of(finite):
        item_counts_kernel[(1,)](finite.view(torch.uint8), out, len(finite), BLOCK=4096)
    return out


@item_counts.register_fake
def _(finite):
    return finite.new_empty(2, dtype=torch.long)
