"""Triton kernel: the sample of an item with stored targets and a shared tail, a program per item."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size


@triton.jit
def assemble_stored_kernel(
    ids, used, target, log_probs, tail_ids, inclusion, labels,
    item_ids, log_weights, certain, out_log_probs, out_target, rank_weights, outside_top,
    num_stored, num_shared, num_tails, unknown: tl.float64,
    HAS_LABEL: tl.constexpr, BLOCK_STORED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes the columns of an item: stored classes, the label, and the tail."""
    item = tl.program_id(0).to(tl.int64)
    ids += item * num_stored
    tail_ids += item % num_tails * num_shared
    inclusion += item % num_tails * num_shared
    num_own = num_stored + (1 if HAS_LABEL else 0)
    first = item * (num_own + num_shared)
    least = tl.cast(unknown, tl.float32)

    place = tl.arange(0, BLOCK_STORED)
    exists = place < num_stored
    own = tl.load(ids + place, exists, -1)
    is_used = tl.load(used + item * num_stored + place, exists, 0) != 0
    tl.store(item_ids + item * num_own + place, own, exists)
    tl.store(log_weights + first + place, tl.where(is_used, 0.0, float("-inf")), exists)
    tl.store(certain + first + place, is_used.to(tl.uint8), exists)
    tl.store(out_log_probs + first + place, tl.load(log_probs + item * num_stored + place, exists, 0), exists)
    tl.store(out_target + first + place, tl.load(target + item * num_stored + place, exists, 0), exists)
    tl.store(rank_weights + item * num_stored + place, tl.where(is_used, 1.0, 0.0), exists)
    label = tl.full((), -1, tl.int64)
    if HAS_LABEL:
        label = tl.load(labels + item)
        is_held = tl.sum((is_used & (own == label)).to(tl.int32), 0) > 0
        tl.store(item_ids + item * num_own + num_stored, label)
        tl.store(log_weights + first + num_stored, tl.where(is_held, float("-inf"), 0.0))
        tl.store(certain + first + num_stored, (is_held == 0).to(tl.uint8))
        tl.store(out_log_probs + first + num_stored, least)
        tl.store(out_target + first + num_stored, 0.0)

    for start in range(0, num_shared, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_shared
        one = tl.load(tail_ids + column, inside, -1)
        held = tl.zeros((BLOCK,), tl.int32)
        for number in range(0, num_stored):
            held += (one == tl.load(ids + number)).to(tl.int32)
        chance = tl.load(inclusion + column, inside, 1)
        log_weight = tl.where(held == 0, -tl.log(chance.to(tl.float32)), float("-inf"))
        if HAS_LABEL:
            log_weight = tl.where(one == label, float("-inf"), log_weight)
        at = first + num_own + column
        tl.store(log_weights + at, log_weight, inside)
        tl.store(certain + at, (chance >= 1).to(tl.uint8), inside)
        tl.store(out_log_probs + at, tl.zeros((BLOCK,), tl.float32) + least, inside)
        tl.store(out_target + at, tl.zeros((BLOCK,), tl.float32), inside)
        tl.store(outside_top + item * num_shared + column, (held == 0).to(tl.uint8), inside)


StoredColumns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("hf_dis::assemble_stored", mutates_args=())
def assemble_stored(
    ids: Tensor,
    used: Tensor,
    target: Tensor,
    log_probs: Tensor,
    tail_ids: Tensor,
    inclusion: Tensor,
    labels: Tensor | None,
    unknown: float,
) -> StoredColumns:
    """Makes the sample of every item from stored targets and shared tails.

    Args:
        ids, used, target, log_probs: of :class:`hf_dis.teacher.cached.CachedTargets`, ``[N, m + T]`` each.
        tail_ids, inclusion: the classes of each tail and their π, ``[G, K_t]``.
        labels: class ids ``[N]``.
        unknown: the log-probability of classes that are not stored.

    Returns:
        ``item_ids``, ``log_weights``, ``certain``, ``log_probs``, ``target``, ``rank_weights`` and ``outside_top`` of
        :class:`hf_dis.sampling.sample.ClassSample`.
    """
    columns = _columns(ids, tail_ids, labels)
    given = [one.contiguous() for one in (ids, used.view(torch.uint8), target, log_probs, tail_ids, inclusion)]
    by_bytes = (one.view(torch.uint8) if one.dtype == torch.bool else one for one in columns)
    num_stored, (num_tails, num_shared) = ids.shape[1], tail_ids.shape
    blocks = {"BLOCK_STORED": block_size(num_stored, 2**20), "BLOCK": block_size(num_shared, 1024)}
    with torch.cuda.device_of(ids):
        assemble_stored_kernel[(len(ids),)](
            *given,
            labels,
            *by_bytes,
            num_stored,
            num_shared,
            num_tails,
            unknown,
            HAS_LABEL=labels is not None,
            **blocks,
        )
    return columns


@assemble_stored.register_fake
def _(ids, used, target, log_probs, tail_ids, inclusion, labels, unknown):
    return _columns(ids, tail_ids, labels)


def _columns(ids: Tensor, tail_ids: Tensor, labels: Tensor | None) -> StoredColumns:
    num_items, num_stored = ids.shape
    num_own, num_shared = num_stored + (labels is not None), tail_ids.shape[1]
    numbers = [ids.new_empty(num_items, num_own + num_shared, dtype=torch.float32) for _ in range(3)]
    log_weights, log_probs, target = numbers
    return (
        ids.new_empty(num_items, num_own),
        log_weights,
        torch.empty_like(log_weights, dtype=torch.bool),
        log_probs,
        target,
        log_weights.new_empty(num_items, num_stored),
        ids.new_empty(num_items, num_shared, dtype=torch.bool),
    )
