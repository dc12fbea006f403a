"""Triton kernels: the steps of the running means of a proposal."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size


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
    new = tl.where(new < 0, 0.0, new)
    known = tl.load(marginal + column, used, 0)
    is_known = (new == new) & (tl.abs(new) != float("inf"))
    step = tl.where(items > 0, tl.cast(renewal, known.dtype), 0.0) * (new - known)
    tl.store(marginal + column, known + tl.where(is_known, step, 0.0), used)


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
        mass: summed over items, ``[C]``; a class whose mean is NaN or Inf is left as it was, and one below 0 counts as
            0.
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
