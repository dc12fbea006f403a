"""Triton kernels: the ranking of a teacher's logits from the best groups of classes, and answers at chosen classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, sum_dtype, unit_columns
from hf_dis.teacher.triton_normaliser import BLOCK as NORMALISER_BLOCK
from hf_dis.teacher.triton_normaliser import log_normaliser_kernel

# Programs that share the items of a chunk. Each needs memory for the maxima of one item, an eighth of its logits. An
# H100 runs four of these programs on each multiprocessor at a time.
PROGRAMS = 512


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
def _keys(values, column, width):
    """Reads numbers as integers of the same order, the lowest integer beyond the width."""
    value = tl.load(values + column, column < width, 0).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(column < width, order, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def best_kernel(values, out, width, depth, stride, LOWEST_BIT: tl.constexpr, BLOCK: tl.constexpr):
    """A program finds the places of an item's highest values: first their lowest one, bit by bit, then all."""
    item = tl.program_id(0).to(tl.int64)
    values += item * stride
    out += item * depth
    lowest = tl.full((), -0x80000000, tl.int64)
    for number in range(0, 32 - LOWEST_BIT):
        higher = lowest + (tl.full((), 1, tl.int64) << (31 - number))
        found = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, width, BLOCK):
            found += (_keys(values, start + tl.arange(0, BLOCK), width) >= higher).to(tl.int32)
        lowest = tl.where(tl.sum(found, 0) >= depth, higher, lowest)
    # Values above the lowest one come first, then as many of the lowest as are left, lower places first.
    num_above = tl.full((), 0, tl.int32)
    for start in range(0, width, BLOCK):
        num_above += tl.sum((_keys(values, start + tl.arange(0, BLOCK), width) > lowest).to(tl.int32), 0)
    above = tl.full((), 0, tl.int32)
    equal = num_above
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = _keys(values, column, width)
        is_above = (key > lowest).to(tl.int32)
        is_equal = (key == lowest).to(tl.int32)
        place = tl.where(is_above > 0, above + tl.cumsum(is_above, 0) - 1, equal + tl.cumsum(is_equal, 0) - 1)
        tl.store(out + place, column.to(tl.int64), (is_above + is_equal > 0) & (place < depth))
        above += tl.sum(is_above, 0)
        equal += tl.sum(is_equal, 0)


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


@triton.jit
def item_kernel(
    logits, log_normaliser, maxima, best, top, ids, tail_ids, labels, out,
    num_items, num_classes, num_grouped, num_groups, depth, num_shared, num_tails, first_item, stride,
    temperature: tl.float64,
    GROUP: tl.constexpr, HAS_LABEL: tl.constexpr, LOWEST_BIT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_RANKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program runs the kernels of an item in turn, item by item; each reads what the one before has written.

    The kernels find their item by the number of the program. So all pointers but those to a program's own memory,
    ``maxima`` and ``best``, move on by the number of programs.
    """
    step = tl.cast(tl.num_programs(0), tl.int64)
    width = depth + num_shared + (1 if HAS_LABEL else 0)
    first = tl.cast(first_item, tl.int64)
    for _ in range(0, tl.cdiv(num_items - tl.program_id(0), tl.num_programs(0))):
        log_normaliser_kernel(
            logits, log_normaliser, maxima, num_classes, num_grouped, stride, temperature, GROUP, BLOCK
        )
        tl.debug_barrier()  # all threads of the program see what one of them wrote
        best_kernel(maxima, best, num_groups, depth, num_groups, LOWEST_BIT, BLOCK_GROUPS)
        tl.debug_barrier()
        rank_kernel(logits, best, top, ids, num_classes, num_groups, depth, stride, GROUP, BLOCK_RANKS)
        tl.debug_barrier()
        answers_kernel(
            logits, top, log_normaliser, tail_ids, labels, out, depth, num_shared, num_tails, first,
            stride, depth, temperature, HAS_LABEL, BLOCK_COLUMNS,
        )  # fmt: skip
        logits += step * stride
        log_normaliser += step
        top += step * depth
        ids += step * depth
        out += step * width
        first += step


# The bits of a float32 below which a number of a narrower type has none.
LOWEST_BITS = {torch.bfloat16: 16, torch.float16: 0, torch.float32: 0}


@torch.library.custom_op("hf_dis::best_places", mutates_args=())
def best_places(values: Tensor, depth: int) -> Tensor:
    """Finds the places of the m highest values of each item, in any order, ``[n, m]`` for ``[n, G]``, m at most G.

    Args:
        values: float32 or narrower; NaN counts as the highest value.
        depth: m.
    """
    values = unit_columns(values)
    out = values.new_empty(len(values), depth, dtype=torch.long)
    sizes = values.shape[1], depth, values.stride(0)
    block = block_size(values.shape[1], 4096)
    with torch.cuda.device_of(values):
        best_kernel[(len(values),)](
            values, out, *sizes, LOWEST_BIT=LOWEST_BITS[values.dtype], BLOCK=block, num_warps=8
        )
    return out


@best_places.register_fake
def _(values, depth):
    return values.new_empty(len(values), depth, dtype=torch.long)


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


@torch.library.custom_op("hf_dis::answers_of_items", mutates_args=())
def answers_of_items(
    logits: Tensor,
    temperature: float,
    depth: int,
    group: int,
    tail_ids: Tensor,
    labels: Tensor | None,
    first_item: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes in one launch what the operations above and the normaliser compute of a chunk.

    Args:
        logits: of the teacher, ``[n, C]``, float32 or narrower.
        temperature: τ > 0.
        depth: m, at most the number of groups.
        group: the classes of a group, a power of two.
        tail_ids, labels, first_item: as for :func:`answers_at`.

    Returns:
        log Σ exp(logit / τ), ``[n, 1]``; the maxima of the groups, ``[p, G]``, and the best groups, ``[p, m]``; the
        highest logits and their class ids, ``[n, m]`` each; and the log-probabilities of :func:`answers_at`. Maxima
        and best groups are those of the last item of each of p programs.
    """
    logits = unit_columns(logits)
    results = _item_results(logits, depth, group, tail_ids, labels)
    log_normaliser, maxima, best, top, ids, out = results
    num_classes, num_groups = logits.shape[1], maxima.shape[1]
    shared = tail_ids.shape[1], len(tail_ids), first_item
    sizes = len(logits), num_classes, num_groups * group, num_groups, depth, *shared
    blocks = {
        "BLOCK": NORMALISER_BLOCK,
        "BLOCK_GROUPS": block_size(num_groups, 4096),
        "BLOCK_RANKS": block_size(group * depth + num_classes - group * num_groups, 2**20),
        "BLOCK_COLUMNS": 1024,
    }
    with torch.cuda.device_of(logits):
        item_kernel[(len(maxima),)](
            logits,
            log_normaliser,
            maxima,
            best,
            top,
            ids,
            tail_ids.contiguous(),
            labels,
            out,
            *sizes,
            logits.stride(0),
            temperature,
            GROUP=group,
            HAS_LABEL=labels is not None,
            LOWEST_BIT=LOWEST_BITS[logits.dtype],
            **blocks,
            num_warps=8,
        )
    return results


@answers_of_items.register_fake
def _(logits, temperature, depth, group, tail_ids, labels, first_item):
    return _item_results(logits, depth, group, tail_ids, labels)


def _item_results(
    logits: Tensor, depth: int, group: int, tail_ids: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    number, wide = len(logits), sum_dtype(logits)
    top = logits.new_empty(number, depth)
    ids = torch.empty_like(top, dtype=torch.long)
    maxima = logits.new_empty(min(number, PROGRAMS), logits.shape[1] // group)
    best = ids.new_empty(len(maxima), depth)
    return logits.new_empty(number, 1, dtype=wide), maxima, best, top, ids, _answers(logits, top, tail_ids, labels)
