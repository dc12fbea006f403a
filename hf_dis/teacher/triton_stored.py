"""Triton kernels: stored targets from their bytes, and as columns of a sample; a program per item."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size


@triton.jit
def _half(place):
    """Reads two bytes as a float16, widened to float32."""
    low, high = tl.load(place).to(tl.int32), tl.load(place + 1).to(tl.int32)
    return (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unpack_kernel(
    packed, ids, log_probs, stored_ids, log_tail_mass, entropy, log_normaliser, depth, sample_size, item_bytes,
    id_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """A program reads the ids of an item as a stream of bits, and its numbers."""
    item = tl.program_id(0).to(tl.int64)
    packed += item * item_bytes
    number = tl.arange(0, BLOCK)
    used = number < depth + sample_size
    bit = number.to(tl.int64) * BITS
    value = tl.zeros((BLOCK,), tl.int64)
    for step in tl.static_range((BITS + 14) // 8):
        byte = bit // 8 + step
        value |= tl.load(packed + byte, used & (byte < id_bytes), 0).to(tl.int64) << (8 * step)
    value = (value >> (bit % 8)) & ((1 << BITS) - 1)
    tl.store(ids + item * depth + number, value, number < depth)
    tl.store(stored_ids + item * sample_size + number - depth, value, used & (number >= depth))
    halves = packed + id_bytes
    rank = tl.arange(0, BLOCK_DEPTH).to(tl.int64)
    last_half = (tl.full((), 0, tl.int64) + depth) * 2
    for low in range(0, depth, BLOCK_DEPTH):
        inside = low + rank < depth
        place = halves + 2 * tl.where(inside, low + rank, 0)
        tl.store(log_probs + item * depth + low + rank, _half(place), inside)
    tl.store(log_tail_mass + item, _half(halves + last_half))
    tl.store(entropy + item, _half(halves + last_half + 2))
    last = halves + last_half + 4
    bits = tl.load(last).to(tl.int32) | (tl.load(last + 1).to(tl.int32) << 8)
    bits |= (tl.load(last + 2).to(tl.int32) << 16) | (tl.load(last + 3).to(tl.int32) << 24)
    tl.store(log_normaliser + item, bits.to(tl.float32, bitcast=True))


@triton.jit
def columns_kernel(
    ids, log_probs, stored_ids, log_tail_mass, entropy, out_ids, used, target, out_log_probs, depth, sample_size,
    unknown: tl.float64, BLOCK_DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program makes the columns of an item's ranked classes and of its stored sample."""
    item = tl.program_id(0).to(tl.int64)
    ids += item * depth
    log_probs += item * depth
    stored_ids += item * sample_size
    first = item * (depth + sample_size)
    least = tl.cast(unknown, tl.float32)
    rank = tl.arange(0, BLOCK_DEPTH)
    is_rank = rank < depth
    ranked = tl.load(ids + rank, is_rank, -1)
    log_prob = tl.load(log_probs + rank, is_rank, float("-inf"))
    prob = tl.exp(log_prob)
    log_prob = tl.maximum(log_prob, least)
    known = tl.sum(tl.where(is_rank, prob * log_prob, 0.0), 0)
    highest = tl.maximum(tl.load(log_probs + depth - 1, depth > 0, 0.0), least)
    tail_mass = tl.exp(tl.load(log_tail_mass + item))
    mean = (-tl.load(entropy + item) - known) / tl.where(tail_mass > 0, tail_mass, 1.0)
    mean = tl.minimum(tl.maximum(mean, least), highest)
    mean = tl.where(tail_mass == 0, least, mean)

    place = tl.arange(0, BLOCK)
    is_stored = place < sample_size
    tail = tl.load(stored_ids + place, is_stored, -1)
    before = tl.load(stored_ids + place - 1, is_stored & (place > 0), -1)
    is_first = is_stored & ((place == 0) | (tail != before))
    for number in range(0, depth):
        is_first = is_first & (tail != tl.load(ids + number))
    times = tl.zeros((BLOCK,), tl.float32)
    for number in range(0, sample_size):
        times += (tail == tl.load(stored_ids + number)).to(tl.float32)
    wanted = tl.where(is_first, times * tail_mass / tl.maximum(sample_size, 1), 0.0)
    total = tl.sum(prob, 0) + tl.sum(wanted, 0)

    tl.store(out_ids + first + rank, ranked, is_rank)
    tl.store(used + first + rank, tl.full((BLOCK_DEPTH,), 1, tl.uint8), is_rank)
    tl.store(target + first + rank, prob / total, is_rank)
    tl.store(out_log_probs + first + rank, log_prob, is_rank)
    at = first + depth + place
    tl.store(out_ids + at, tail, is_stored)
    tl.store(used + at, is_first.to(tl.uint8), is_stored)
    tl.store(target + at, wanted / total, is_stored)
    tl.store(out_log_probs + at, tl.zeros((BLOCK,), tl.float32) + mean, is_stored)


@torch.library.custom_op("hf_dis::unpack_targets", mutates_args=())
def unpack_targets(
    packed: Tensor, depth: int, sample_size: int, id_bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Unpacks stored items as :meth:`hf_dis.teacher.compact.TargetLayout.unpack` does.

    Args:
        packed: uint8, ``[n, item_bytes]``.
        depth, sample_size: m and T.
        id_bits: bits of a class id, at most 33.

    Returns:
        the fields of :class:`hf_dis.teacher.compact.CompactTargets`.
    """
    packed, results = packed.contiguous(), _unpacked(packed, depth, sample_size)
    id_bytes = -(-(depth + sample_size) * id_bits // 8)
    blocks = {"BLOCK": block_size(depth + sample_size, 2**20), "BLOCK_DEPTH": block_size(depth, 256)}
    with torch.cuda.device_of(packed):
        unpack_kernel[(len(packed),)](
            packed, *results, depth, sample_size, packed.shape[1], id_bytes, BITS=id_bits, **blocks
        )
    return results


@unpack_targets.register_fake
def _(packed, depth, sample_size, id_bits):
    return _unpacked(packed, depth, sample_size)


def _unpacked(packed: Tensor, depth: int, sample_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_items = len(packed)
    numbers = [packed.new_empty(num_items, dtype=torch.float32) for _ in range(3)]
    return (
        packed.new_empty(num_items, depth, dtype=torch.long),
        packed.new_empty(num_items, depth, dtype=torch.float32),
        packed.new_empty(num_items, sample_size, dtype=torch.long),
        *numbers,
    )


@torch.library.custom_op("hf_dis::stored_columns", mutates_args=())
def stored_columns(
    ids: Tensor, log_probs: Tensor, stored_ids: Tensor, log_tail_mass: Tensor, entropy: Tensor, unknown: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prepares stored targets as :class:`hf_dis.teacher.cached.CachedTargets` does.

    Args:
        ids, log_probs, stored_ids, log_tail_mass, entropy: of the targets.
        unknown: the lowest log-probability.

    Returns:
        ``ids``, ``used``, ``target`` and ``log_probs``, ``[n, m + T]`` each.
    """
    given = [one.contiguous() for one in (ids, log_probs, stored_ids, log_tail_mass, entropy)]
    out_ids, used, target, out_log_probs = results = _stored(ids, stored_ids)
    depth, sample_size = ids.shape[1], stored_ids.shape[1]
    blocks = {"BLOCK_DEPTH": block_size(depth, 2**20), "BLOCK": block_size(sample_size, 2**20)}
    with torch.cuda.device_of(ids):
        columns_kernel[(len(ids),)](
            *given, out_ids, used.view(torch.uint8), target, out_log_probs, depth, sample_size, unknown, **blocks
        )
    return results


@stored_columns.register_fake
def _(ids, log_probs, stored_ids, log_tail_mass, entropy, unknown):
    return _stored(ids, stored_ids)


def _stored(ids: Tensor, stored_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = ids.new_empty(len(ids), ids.shape[1] + stored_ids.shape[1])
    numbers = [torch.empty_like(out, dtype=torch.float32) for _ in range(2)]
    return out, torch.empty_like(out, dtype=torch.bool), *numbers
