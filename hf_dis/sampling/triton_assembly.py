"""Triton kernels: the sample of an item from the teacher's targets, a program per item."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, unit_columns
from hf_dis.teacher.triton_normaliser import add_exponentials

# Columns of the shared tail that a program reads at a time.
BLOCK = 1024


@triton.jit
def inclusion_kernel(density, expected, cumulative, num_entries, num_sampled, density_stride, BLOCK: tl.constexpr):
    """A program computes the inclusion probabilities of a density, and their running sum."""
    program = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK)
    used = entry < num_entries
    size = tl.load(density + program * density_stride + entry, used, 0).to(expected.dtype.element_ty)
    others = tl.cumsum(size, 0, reverse=True)
    scale = tl.max(tl.where(used & (entry < num_sampled), (num_sampled - entry) / others, 0.0), 0)
    chance = tl.where(num_sampled < num_entries, tl.minimum(scale * size, 1.0), 1.0)
    tl.store(expected + program * num_entries + entry, chance, used)
    tl.store(cumulative + program * num_entries + entry, tl.cumsum(tl.where(used, chance, 0.0), 0), used)


@triton.jit
def is_held(ids, own, depth):
    """Tells the classes that are among the first of an item's classes."""
    held = tl.zeros(own.shape, tl.int32)
    for rank in range(0, depth):
        held += (own == tl.load(ids + rank)).to(tl.int32)
    return held > 0


@triton.jit
def tail_columns(ids, tail_ids, inclusion, log_probs, column, num_shared, depth, label, HAS_LABEL: tl.constexpr):
    """Reads columns of an item's tail; the log-probabilities are those of the tail.

    Returns:
        true where the class is outside the item's ranked classes, log p, log ω, and true where certain.
    """
    used = column < num_shared
    own = tl.load(tail_ids + column, used, -1)
    chance = tl.load(inclusion + column, used, 1)
    log_prob = tl.load(log_probs + column, used, float("-inf"))
    log_weight = -tl.log(chance.to(log_prob.dtype))
    out = used & (is_held(ids, own, depth) == 0)
    if HAS_LABEL:
        log_weight = tl.where(out & (own != label), log_weight, float("-inf"))
    else:
        log_weight = tl.where(out, log_weight, float("-inf"))
    return out, log_prob, log_weight, used & (chance >= 1)


@triton.jit
def add_target(peak, total, exact, log_prob, log_weight, is_certain):
    """Adds columns of a tail: peak and sum of ω·p where not certain, and the mass of the certain columns."""
    weighted = log_prob + log_weight
    exact += tl.sum(tl.where(is_certain, tl.exp(weighted), 0.0), 0)
    peak, total = add_exponentials(peak, total, tl.where(is_certain, float("-inf"), weighted))
    return peak, total, exact


@triton.jit
def _tail_target(mass, ids, tail_ids, inclusion, log_probs, num_shared, depth, label,
                 HAS_LABEL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums a tail by add_target, and finds the rest of its mass, which the columns that are not certain share."""
    peak, zero = tl.full((), float("-inf"), log_probs.dtype.element_ty), tl.full((), 0, log_probs.dtype.element_ty)
    total, exact = zero, zero
    for start in range(0, num_shared, BLOCK):
        column = start + tl.arange(0, BLOCK)
        _, log_prob, log_weight, is_certain = tail_columns(
            ids, tail_ids, inclusion, log_probs, column, num_shared, depth, label, HAS_LABEL
        )
        peak, total, exact = add_target(peak, total, exact, log_prob, log_weight, is_certain)
    return peak, total, tl.maximum(mass - exact, 0), exact


@triton.jit
def share_of_tail(log_prob, log_weight, is_certain, peak, total, rest):
    """The target of columns of a tail: p of certain ones, and a share of the rest of their mass."""
    weighted = log_prob + log_weight
    part = _share(tl.where(is_certain, float("-inf"), weighted), peak, total, rest)
    return part + tl.where(is_certain, tl.exp(weighted), 0.0)


@triton.jit
def _ranks(expected, cumulative, point, depth, STEPS: tl.constexpr):
    """Finds the ranks at points, and their inclusion probabilities."""
    low = tl.zeros(point.shape, tl.int32)
    high = low + depth
    for _ in range(STEPS):  # the first rank whose sum is above the point lies in low..high
        middle = tl.minimum((low + high) // 2, depth - 1)
        is_below = (tl.load(cumulative + middle) <= point) & (low < high)
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_below, high, middle)
    low = tl.minimum(low, depth - 1)
    return low, tl.load(expected + low)


@triton.jit
def _share(weighted, peak, total, rest):
    """The part of the rest that a column takes; 0 where no column can take any."""
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    return tl.where(total > 0, tl.exp(weighted - finite) / tl.where(total > 0, total, 1.0) * rest, 0.0)


@triton.jit
def _masses(ids, log_probs, depth, label, label_prob, BLOCK_DEPTH: tl.constexpr):
    """Sums the teacher's probability of the ranked classes, and of all other classes, without that of the label."""
    place = tl.arange(0, BLOCK_DEPTH)
    ranked = tl.load(ids + place, place < depth, -1)
    mass = tl.sum(tl.exp(tl.load(log_probs + place, place < depth, float("-inf"))), 0)
    in_top = tl.sum((ranked == label).to(tl.int32), 0) > 0
    return mass - tl.where(in_top, label_prob, 0.0), 1 - mass - tl.where(in_top, 0.0, label_prob)


@triton.jit
def _ranked_target(weighted, is_certain, mass):
    """The target of the ranked columns: p of certain ones, and a share of the rest of their mass."""
    exact = tl.where(is_certain, tl.exp(weighted), 0.0)
    open = tl.where(is_certain, float("-inf"), weighted)
    peak, total = add_exponentials(tl.full((), float("-inf"), exact.dtype), tl.full((), 0, exact.dtype), open)
    return exact + _share(open, peak, total, tl.maximum(mass - tl.sum(exact, 0), 0))


@triton.jit
def ranked_columns(
    ids, log_probs, expected, cumulative, starts, labels, label_log_probs, ranks, rank_weights,
    item, k, depth, num_sampled, density_stride,
    HAS_LABEL: tl.constexpr, ALL_RANKS: tl.constexpr, STEPS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Samples K ranks of an item, of which ids, log_probs and label_log_probs are, and stores ranks and weights.

    Returns:
        of each rank class, log p, log ω, true where certain, and target. Of the item label, log p of the label, and
        the mass of all classes that are neither ranked nor the label.
    """
    dtype: tl.constexpr = log_probs.dtype.element_ty
    label, label_log_prob, label_prob = tl.full((), -1, tl.int64), tl.full((), 0, dtype), tl.full((), 0, dtype)
    if HAS_LABEL:
        label = tl.load(labels + item)
        label_log_prob = tl.load(label_log_probs)
        label_prob = tl.exp(label_log_prob)
    mass, other_mass = _masses(ids, log_probs, depth, label, label_prob, BLOCK_DEPTH)
    used = k < num_sampled
    if ALL_RANKS:
        rank = tl.minimum(k, depth - 1)
        chance = tl.full(k.shape, 1, dtype)
    else:
        row = item * density_stride
        rank, chance = _ranks(expected + row, cumulative + row, tl.load(starts + item) + k, depth, STEPS)
    own = tl.load(ids + rank)
    log_prob = tl.load(log_probs + rank)
    log_weight = -tl.log(chance).to(dtype)
    tl.store(ranks + item * num_sampled + k, rank.to(tl.int64), used)
    tl.store(rank_weights + item * num_sampled + k, tl.exp(log_weight), used)
    if HAS_LABEL:
        log_weight = tl.where(own == label, float("-inf"), log_weight)
    is_certain = used & (chance >= 1)
    weighted = tl.where(used, log_prob + log_weight, float("-inf"))
    wanted = _ranked_target(weighted, is_certain, mass)
    return own, log_prob, log_weight, is_certain, wanted, label, label_log_prob, other_mass


@triton.jit
def all_mass(own, tail_exact, tail_total, tail_rest):
    """Sums the targets of an item's own classes and of its tail, and avoids a division by 0."""
    return tl.maximum(own + tail_exact + tl.where(tail_total > 0, tail_rest, 0.0), 1.1754943508222875e-38)


@triton.jit
def _store(out, at, mask, log_weight, is_certain, log_prob, part):
    """Stores columns of an item: log ω, certain, log p and target."""
    log_weights, certain, log_probs, target = out
    tl.store(log_weights + at, log_weight, mask)
    tl.store(certain + at, is_certain.to(tl.uint8), mask)
    tl.store(log_probs + at, log_prob, mask)
    tl.store(target + at, part, mask)


@triton.jit
def _store_tail(
    out, num_own, outside_top, ids, tail_ids, inclusion, log_probs, num_shared, depth, label,
    peak, total, rest, total_target, HAS_LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the columns of an item's tail."""
    for start in range(0, num_shared, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_out, log_prob, log_weight, is_certain = tail_columns(
            ids, tail_ids, inclusion, log_probs, column, num_shared, depth, label, HAS_LABEL
        )
        part = share_of_tail(log_prob, log_weight, is_certain, peak, total, rest)
        inside = column < num_shared
        _store(out, num_own + column, inside, log_weight, is_certain, log_prob, part / total_target)
        tl.store(outside_top + column, is_out.to(tl.uint8), inside)


@triton.jit
def assemble_kernel(
    ids, log_probs, tail_ids, inclusion, expected, cumulative, starts, labels,
    item_ids, log_weights, certain, out_log_probs, target, ranks, rank_weights, outside_top,
    depth, num_sampled, num_shared, num_tails, ids_stride, log_probs_stride, density_stride,
    HAS_LABEL: tl.constexpr, ALL_RANKS: tl.constexpr, STEPS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes the columns of an item: K ranks, the label, and the tail."""
    item = tl.program_id(0).to(tl.int64)
    ids, log_probs = ids + item * ids_stride, log_probs + item * log_probs_stride
    tail_ids += item % num_tails * num_shared
    inclusion += item % num_tails * num_shared
    num_own = num_sampled + (1 if HAS_LABEL else 0)
    first = item * (num_own + num_shared)

    k = tl.arange(0, BLOCK_RANKS)
    own, log_prob, log_weight, is_certain, wanted, label, label_log_prob, tail_mass = ranked_columns(
        ids, log_probs, expected, cumulative, starts, labels, log_probs + depth + num_shared, ranks, rank_weights,
        item, k, depth, num_sampled, density_stride, HAS_LABEL, ALL_RANKS, STEPS, BLOCK_DEPTH,
    )  # fmt: skip
    label_prob = tl.exp(label_log_prob) if HAS_LABEL else 0.0
    log_probs += depth  # those of the tail
    tail_peak, tail_total, tail_rest, tail_exact = _tail_target(
        tail_mass, ids, tail_ids, inclusion, log_probs, num_shared, depth, label, HAS_LABEL, BLOCK
    )
    total_target = all_mass(tl.sum(wanted, 0) + label_prob, tail_exact, tail_total, tail_rest)

    used = k < num_sampled
    out = (log_weights + first, certain + first, out_log_probs + first, target + first)
    tl.store(item_ids + item * num_own + k, own, used)
    _store(out, k, used, log_weight, is_certain, log_prob, wanted / total_target)
    if HAS_LABEL:
        tl.store(item_ids + item * num_own + num_sampled, label)
        is_there = label == label
        _store(out, num_sampled, is_there, 0.0, is_there, label_log_prob, label_prob / total_target)

    _store_tail(
        out, num_own, outside_top + item * num_shared, ids, tail_ids, inclusion, log_probs, num_shared, depth, label,
        tail_peak, tail_total, tail_rest, total_target, HAS_LABEL, BLOCK,
    )  # fmt: skip


@torch.library.custom_op("hf_dis::rank_inclusion", mutates_args=())
def rank_inclusion(density: Tensor, num_sampled: int) -> tuple[Tensor, Tensor]:
    """Computes π as :func:`hf_dis.sampling.designs.inclusion_probabilities`, and its running sum: ``[n, B]`` each.

    Args:
        density: falling, positive on at least K entries, ``[n, B]``.
        num_sampled: K.
    """
    density = unit_columns(density)
    expected, cumulative = density.new_empty(density.shape), density.new_empty(density.shape)
    num_rows, num_entries = density.shape
    with torch.cuda.device_of(density):
        inclusion_kernel[(num_rows,)](
            density,
            expected,
            cumulative,
            num_entries,
            num_sampled,
            density.stride(0),
            BLOCK=block_size(num_entries, 2**20),
        )
    return expected, cumulative


@rank_inclusion.register_fake
def _(density, num_sampled):
    return density.new_empty(density.shape), density.new_empty(density.shape)


Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("hf_dis::assemble", mutates_args=())
def assemble(
    ids: Tensor,
    log_probs: Tensor,
    tail_ids: Tensor,
    inclusion: Tensor,
    expected: Tensor | None,
    cumulative: Tensor | None,
    starts: Tensor | None,
    labels: Tensor | None,
    num_sampled: int,
) -> Columns:
    """Makes the sample of every item from the teacher's targets, with all columns of the strata.

    Args:
        ids: the m best-ranked classes of each item, ``[N, m]``.
        log_probs: log-probabilities of these classes, of the item's tail, and of the label if there are labels,
            ``[N, m + K_t]`` or ``[N, m + K_t + 1]``, float32 or wider.
        tail_ids, inclusion: the classes of each tail and their π, ``[G, K_t]``.
        expected, cumulative: of :func:`rank_inclusion`, for all items or for each: ``[1, m]`` or ``[N, m]``; None: all
            ranks are sampled, each with certainty.
        starts: of the systematic samples, within [0, 1), ``[N]``; None: all ranks are sampled.
        labels: class ids ``[N]``.
        num_sampled: K.

    Returns:
        ``item_ids``, ``log_weights``, ``certain``, ``log_probs``, ``target``, ``ranks``, ``rank_weights`` and
        ``outside_top`` of :class:`hf_dis.sampling.sample.ClassSample`.
    """
    ids, log_probs = unit_columns(ids), unit_columns(log_probs)
    columns = _columns(ids, log_probs, tail_ids, labels, num_sampled)
    depth, (num_tails, num_shared) = ids.shape[1], tail_ids.shape
    by_bytes = (one.view(torch.uint8) if one.dtype == torch.bool else one for one in columns)
    takes_all = expected is None
    strides = ids.stride(0), log_probs.stride(0), 0 if takes_all or len(expected) == 1 else expected.stride(0)
    given = tail_ids.contiguous(), inclusion.contiguous(), expected, cumulative, starts, labels
    blocks = {"BLOCK_RANKS": block_size(num_sampled, 2**20), "BLOCK_DEPTH": block_size(depth, 2**20)}
    with torch.cuda.device_of(ids):
        assemble_kernel[(len(ids),)](
            ids, log_probs, *given, *by_bytes, depth, num_sampled, num_shared, num_tails, *strides,
            HAS_LABEL=labels is not None, ALL_RANKS=takes_all, STEPS=depth.bit_length() + 1,
            BLOCK=block_size(num_shared, BLOCK), **blocks,
        )  # fmt: skip
    return columns


@assemble.register_fake
def _(ids, log_probs, tail_ids, inclusion, expected, cumulative, starts, labels, num_sampled):
    return _columns(ids, log_probs, tail_ids, labels, num_sampled)


def _columns(ids: Tensor, log_probs: Tensor, tail_ids: Tensor, labels: Tensor | None, num_sampled: int) -> Columns:
    num_items, num_shared = len(ids), tail_ids.shape[1]
    num_own = num_sampled + (labels is not None)
    all_columns = log_probs.new_empty(num_items, num_own + num_shared)
    return (
        ids.new_empty(num_items, num_own),
        torch.empty_like(all_columns, dtype=torch.float32),
        torch.empty_like(all_columns, dtype=torch.bool),
        torch.empty_like(all_columns),
        torch.empty_like(all_columns),
        ids.new_empty(num_items, num_sampled),
        all_columns.new_empty(num_items, num_sampled, dtype=torch.float32),
        ids.new_empty(num_items, num_shared, dtype=torch.bool),
    )
