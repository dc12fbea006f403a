"""Triton kernels: the statistics that a proposal learns from, and the steps of its running means."""

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
    signal,
    outside_top,
    finite,
    out,
    num_items,
    num_shared,
    num_tails,
    signal_stride,
    outside_stride,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program sums squares and items of BLOCK columns over the items of a tail."""
    tail = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), out.dtype.element_ty)
    items = tl.zeros((BLOCK,), out.dtype.element_ty)
    for start in range(0, tl.cdiv(num_items, num_tails), BLOCK_ITEMS):
        item = tail + (start + tl.arange(0, BLOCK_ITEMS)).to(tl.int64) * num_tails
        is_finite = tl.load(finite + item, item < num_items, 0) != 0
        used = is_finite[:, None] & (column < num_shared)[None, :]
        met = tl.load(outside_top + (item * outside_stride)[:, None] + column[None, :], used, 0) != 0
        value = tl.load(signal + (item * signal_stride)[:, None] + column[None, :], met, 0).to(squares.dtype)
        squares += tl.sum(value * value, 0)
        items += tl.sum(met.to(items.dtype), 0)
    place = out + (tail * num_shared + column) * 2
    tl.store(place, squares, column < num_shared)
    tl.store(place + 1, items, column < num_shared)


@triton.jit
def step_ranks_kernel(
    rank_squared,
    num_items,
    squared_signal,
    observed,
    weights,
    masses,
    uniform,
    bin_sizes,
    num_scales,
    num_bins,
    renewal: tl.float64,
    BLOCK_SCALES: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
):
    """The one program takes a step's sums into the running mean, and the weights one iteration further."""
    dtype: tl.constexpr = weights.dtype.element_ty
    scale = tl.arange(0, BLOCK_SCALES)
    bin = tl.arange(0, BLOCK_BINS)
    is_bin = bin < num_bins
    items = tl.load(num_items).to(dtype)
    size = tl.load(bin_sizes + bin, is_bin, 1)
    share = tl.where(items > 0, tl.cast(renewal, dtype), tl.full((), 0, dtype))
    known = tl.load(squared_signal + bin, is_bin, 0)
    known += share * (tl.load(rank_squared + bin, is_bin, 0) / (tl.maximum(items, 1) * size) - known)
    tl.store(squared_signal + bin, known, is_bin)
    seen = tl.load(observed)
    seen += share * (1 - seen)
    tl.store(observed, seen)
    wanted = size * tl.sqrt(known / tl.maximum(seen, 1e-12))
    weight = tl.load(weights + scale, scale < num_scales, 0)
    places = (scale.to(tl.int64) * num_bins)[:, None] + bin[None, :]
    mass = tl.load(masses + places, (scale < num_scales)[:, None] & is_bin[None, :], 0)
    proposed = tl.sum(weight[:, None] * mass, 0) + tl.load(uniform + bin, is_bin, 1)
    weight *= tl.sum(mass * (wanted / proposed)[None, :], 1) + 1e-12
    tl.store(weights + scale, weight / tl.sum(weight, 0), scale < num_scales)


@triton.jit
def step_classes_kernel(ids, sums, squared_signal, number, renewal: tl.float64, BLOCK: tl.constexpr):
    """A program renews the mean of BLOCK classes that were met, and empties their sums.

    A class may be met several times: the exchange lets one of the programs renew it.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + place, place < number, 0)
    counts = (sums + row * 2 + 1).to(tl.pointer_type(tl.int32), bitcast=True)  # the interpreter exchanges integers
    items = tl.atomic_xchg(counts, tl.zeros((BLOCK,), tl.int32), place < number).to(tl.float32, bitcast=True)
    met = (place < number) & (items > 0)
    square = tl.load(sums + row * 2, met, 0)
    known = tl.load(squared_signal + row, met, 0)
    share = tl.cast(renewal, known.dtype)
    tl.store(squared_signal + row, known + share * (square / tl.where(met, items, 1.0) - known), met)
    tl.store(sums + row * 2, tl.zeros((BLOCK,), tl.float32), met)


@triton.jit
def step_marginal_kernel(mass, num_items, not_finite, marginal, num_classes, renewal: tl.float64, BLOCK: tl.constexpr):
    """A program steps the running mean of the teacher's mass of BLOCK classes."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = column < num_classes
    items = (tl.load(num_items) + tl.load(not_finite)).to(marginal.dtype.element_ty)
    new = tl.load(mass + column, used, 0).to(marginal.dtype.element_ty) / tl.maximum(items, 1)
    known = tl.load(marginal + column, used, 0)
    is_known = (new == new) & (tl.abs(new) != float("inf"))
    step = tl.where(items > 0, tl.cast(renewal, known.dtype), 0.0) * (new - known)
    tl.store(marginal + column, known + tl.where(is_known, step, 0.0), used)


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
    """Sums over the items of each tail, as :meth:`hf_dis.sampling.class_memory.ClassMemory.statistics` does.

    Args:
        signal: at the columns of the tail, ``[N, K_t]``.
        outside_top: the columns that an item counts, bool, ``[N, K_t]``.
        finite: the items to sum, bool, ``[N]``.
        num_tails: G; item i uses tail ``i mod G``.

    Returns:
        sum of the squares, and number of items, float32, ``[G·K_t, 2]``.
    """
    signal, outside_top = unit_columns(signal), unit_columns(outside_top.view(torch.uint8))
    num_items, num_shared = signal.shape
    out = signal.new_empty(num_tails * num_shared, 2, dtype=torch.float32)
    sizes = num_items, num_shared, num_tails, signal.stride(0), outside_top.stride(0)
    with torch.cuda.device_of(signal):
        tail_sums_kernel[num_tails, triton.cdiv(num_shared, 32)](
            signal, outside_top, finite.view(torch.uint8), out, *sizes, BLOCK_ITEMS=32, BLOCK=32
        )
    return out


@tail_sums.register_fake
def _(signal, outside_top, finite, num_tails):
    return signal.new_empty(num_tails * signal.shape[1], 2, dtype=torch.float32)


@torch.library.custom_op("hf_dis::step_ranks", mutates_args=("squared_signal", "observed", "weights"))
def step_ranks(
    rank_squared: Tensor,
    num_items: Tensor,
    squared_signal: Tensor,
    observed: Tensor,
    weights: Tensor,
    masses: Tensor,
    uniform: Tensor,
    bin_sizes: Tensor,
    renewal: float,
) -> None:
    """Steps the running mean and the weights of a :class:`hf_dis.sampling.rank_proposal.RankProposal`, in place.

    Args:
        rank_squared, num_items: the statistics of the step, ``[bins]`` and a scalar.
        squared_signal, observed, weights: of the proposal.
        masses, uniform, bin_sizes: of the bins, ``[J, bins]``, ``[bins]`` and ``[bins]``.
        renewal: the share of the step in the running mean.
    """
    num_scales, num_bins = masses.shape
    blocks = {"BLOCK_SCALES": block_size(num_scales, 2**10), "BLOCK_BINS": block_size(num_bins, 2**10)}
    state = squared_signal, observed, weights, masses.contiguous(), uniform, bin_sizes
    with torch.cuda.device_of(weights):
        step_ranks_kernel[(1,)](rank_squared, num_items, *state, num_scales, num_bins, renewal, **blocks)


@step_ranks.register_fake
def _(rank_squared, num_items, squared_signal, observed, weights, masses, uniform, bin_sizes, renewal):
    return None


@torch.library.custom_op("hf_dis::step_classes", mutates_args=("sums", "squared_signal"))
def step_classes(ids: Tensor, sums: Tensor, squared_signal: Tensor, renewal: float) -> None:
    """Renews the mean of the classes that were met, and sets their sums to zero.

    Args:
        ids: classes, int64, ``[E]``; a class may be there several times.
        sums: sum of the squared signal, and number of items, float32, ``[C, 2]``.
        squared_signal: the running mean, ``[C]``.
        renewal: the share of a new value in the mean.
    """
    with torch.cuda.device_of(ids):
        step_classes_kernel[(triton.cdiv(len(ids), 256),)](ids, sums, squared_signal, len(ids), renewal, BLOCK=256)


@step_classes.register_fake
def _(ids, sums, squared_signal, renewal):
    return None


@torch.library.custom_op("hf_dis::step_marginal", mutates_args=("marginal",))
def step_marginal(mass: Tensor, num_items: Tensor, not_finite: Tensor, marginal: Tensor, renewal: float) -> None:
    """Steps the running mean of the teacher's mass of each class per item.

    Args:
        mass: summed over items, ``[C]``; a class whose mean is NaN or Inf is left as it was.
        num_items, not_finite: numbers of items with and without a finite signal, scalars. Nothing changes without one.
        marginal: the running mean, ``[C]``.
        renewal: the share of the step in the running mean.
    """
    with torch.cuda.device_of(mass):
        step_marginal_kernel[(triton.cdiv(len(mass), 1024),)](
            mass, num_items, not_finite, marginal, len(mass), renewal, BLOCK=1024
        )


@step_marginal.register_fake
def _(mass, num_items, not_finite, marginal, renewal):
    return None
