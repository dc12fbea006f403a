"""Triton kernels: the ranking of a teacher's logits from the best groups of classes, and answers at chosen classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, sum_dtype, unit_columns


@triton.jit
def rank_kernel(
    logits, groups, top, ids, num_classes, num_groups, depth, stride, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """A program sorts the classes of an item's best groups, and those in no group."""
    item = tl.program_id(0).to(tl.int64)
    logits += item * stride
    place = tl.arange(0, BLOCK)
    in_group = place < GROUP * depth
    group = tl.load(groups + item * depth + place // GROUP, in_group, 0)
    left_over = place - GROUP * depth + (num_classes - num_classes % GROUP)
    column = tl.where(in_group, group + (place % GROUP).to(tl.int64) * num_groups, left_over)
    logit = tl.load(logits + column, column < num_classes, float("-inf")).to(tl.float32)
    # The bits of a number as an integer of the same order, and below them the class, lower classes first.
    bits = logit.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    both = (order << 32) | (0x7FFFFFFF - column)
    both = tl.sort(tl.where(column < num_classes, both, -0x7FFFFFFFFFFFFFFF), descending=True)
    column = 0x7FFFFFFF - (both & 0x7FFFFFFF)
    bits = (both >> 32).to(tl.int32)
    logit = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    tl.store(top + item * depth + place, logit, place < depth)
    tl.store(ids + item * depth + place, column, place < depth)


@triton.jit
def answers_kernel(
    logits, highest, log_normaliser, tail_ids, labels, out, depth, num_shared, num_tails, first_item,
    logits_stride, highest_stride, temperature: tl.float64, HAS_LABEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes log-probabilities of an item: of its ranked classes, of its tail, and of its label."""
    item = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    width = depth + num_shared + (1 if HAS_LABEL else 0)
    factor = tl.cast(1 / temperature, dtype)
    normaliser = tl.load(log_normaliser + item)
    logits += item * logits_stride
    tail_ids += (first_item + item) % num_tails * num_shared
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        in_tail = (column >= depth) & (column < depth + num_shared)
        own = tl.load(tail_ids + column - depth, in_tail, 0)
        if HAS_LABEL:
            own = tl.where(column == depth + num_shared, tl.load(labels + first_item + item), own)
        ranked = tl.load(highest + item * highest_stride + column, column < depth, 0)
        logit = tl.load(logits + own, (column >= depth) & (column < width), 0)
        logit = tl.where(column < depth, ranked, logit).to(dtype)
        tl.store(out + item * width + column, logit * factor - normaliser, column < width)


@torch.library.custom_op("hf_dis::rank_groups", mutates_args=())
def rank_groups(logits: Tensor, groups: Tensor, num_groups: int, group: int) -> tuple[Tensor, Tensor]:
    """Finds the m highest logits of each item and their classes, best first, from its m best groups.

    Args:
        logits: ``[n, C]``, float32 or narrower; C is below 2^31.
        groups: the m groups with the highest maxima, in any order, ``[n, m]``; class c is in group c mod G.
        num_groups: G, C divided by the size of a group and rounded down.
        group: the size of a group.

    Returns:
        logits and class ids, ``[n, m]`` each; of equal logits the lower class first.
    """
    logits, depth = unit_columns(logits), groups.shape[1]
    top, ids = torch.empty_like(groups, dtype=logits.dtype), torch.empty_like(groups)
    sizes = logits.shape[1], num_groups, depth, logits.stride(0)
    block = block_size(group * depth + logits.shape[1] - group * num_groups, 2**20)
    with torch.cuda.device_of(logits):
        rank_kernel[(len(logits),)](logits, groups.contiguous(), top, ids, *sizes, GROUP=group, BLOCK=block)
    return top, ids


@rank_groups.register_fake
def _(logits, groups, num_groups, group):
    return torch.empty_like(groups, dtype=logits.dtype), torch.empty_like(groups)


@torch.library.custom_op("hf_dis::answers_at", mutates_args=())
def answers_at(
    logits: Tensor,
    highest: Tensor,
    log_normaliser: Tensor,
    tail_ids: Tensor,
    labels: Tensor | None,
    first_item: int,
    temperature: float,
) -> Tensor:
    """Computes log-probabilities at τ of a chunk's ranked classes, shared tails and labels.

    Args:
        logits: of the teacher, ``[n, C]``.
        highest: logits of the ranked classes, ``[n, m]``.
        log_normaliser: log Σ exp(logit / τ), ``[n, 1]``.
        tail_ids: classes of each tail, ``[G, K_t]``; item i of all uses tail ``i mod G``.
        labels: class ids of all items, ``[N]``, or None.
        first_item: the number of the chunk's first item.
        temperature: τ > 0.

    Returns:
        ``[n, m + K_t]``, with labels ``[n, m + K_t + 1]``; float32 or wider.
    """
    logits, highest = unit_columns(logits), unit_columns(highest)
    out = _answers(logits, highest, tail_ids, labels)
    sizes = highest.shape[1], tail_ids.shape[1], len(tail_ids), first_item, logits.stride(0), highest.stride(0)
    given = log_normaliser.contiguous(), tail_ids.contiguous(), labels
    with torch.cuda.device_of(logits):
        answers_kernel[(len(logits),)](
            logits, highest, *given, out, *sizes, temperature, HAS_LABEL=labels is not None, BLOCK=1024
        )
    return out


@answers_at.register_fake
def _(logits, highest, log_normaliser, tail_ids, labels, first_item, temperature):
    return _answers(logits, highest, tail_ids, labels)


def _answers(logits: Tensor, highest: Tensor, tail_ids: Tensor, labels: Tensor | None) -> Tensor:
    width = highest.shape[1] + tail_ids.shape[1] + (labels is not None)
    return logits.new_empty(len(logits), width, dtype=sum_dtype(logits))
