"""A teacher's targets in a few bytes: the ranked classes, and an unbiased stored sample of all other classes.

The m best-ranked classes keep their probability. T classes stand for the rest of the mass, the tail. Systematic
sampling lays the probabilities of the tail end to end, and reads T equally spaced points with one random start. Then
a class is met T p / mass times on average, and stands for mass / T each time, so it costs no more than its id. With
independent samples and m = 0 this is the estimator of "Sparse Logit Sampling" (RS-KD, ACL 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.checks import require
from hf_dis.kernels import uses_triton
from hf_dis.teacher.ranking import top_ranked
from hf_dis.teacher.targets import block_items, widen

# The designs of a stored sample.
STORED_DESIGNS = ("systematic", "independent")


class CompactTargets(NamedTuple):
    """The part of a teacher's targets that a cache keeps, at a temperature.

    Attributes:
        ids: the m best-ranked classes, best first, ``[n, m]``.
        log_probs: log-probabilities of the ranked classes, ``[n, m]``.
        stored_ids: the stored sample: T classes of the tail, ascending, each as often as it was sampled, ``[n, T]``.
            Where the tail has no mass, one class that is not ranked, T times.
        log_tail_mass: log-probability of all classes that are not ranked, ``[n]``; -inf where they have no mass.
        entropy: of the whole distribution, in nats, ``[n]``.
        log_normaliser: log Σ exp(logit / τ), ``[n]``.
    """

    ids: Tensor
    log_probs: Tensor
    stored_ids: Tensor
    log_tail_mass: Tensor
    entropy: Tensor
    log_normaliser: Tensor


def compact_targets(
    logits: Tensor,
    temperature: float,
    depth: int,
    sample_size: int,
    generator: torch.Generator,
    design: str = "systematic",
) -> CompactTargets:
    """Ranks each item and samples from its tail, by blocks of items.

    Args:
        logits: of the teacher, ``[n, C]``; finite, or -inf for masked classes.
        temperature: τ > 0.
        depth: m, from 0 to C.
        sample_size: T >= 0; 0 where all classes are ranked.
        generator: a CPU generator; the same state gives the same sample on every device.
        design: ``"systematic"``, or ``"independent"``: T independent samples.

    Raises:
        ValueError: if all classes are ranked and T is above 0.
    """
    no_tail = depth >= logits.shape[1]
    require(not (no_tail and sample_size), "sample_size", sample_size, "0 where depth is the number of classes")
    starts = torch.rand(len(logits), 1 if design == "systematic" else sample_size, generator=generator)
    starts, items = starts.to(logits.device), block_items(logits)
    with torch.autocast(logits.device.type, enabled=False):  # which would round the products of the entropy
        blocks = [
            _compact_block(widen(part) / temperature, depth, sample_size, start)
            for part, start in zip(logits.split(items), starts.split(items), strict=True)
        ]
    return CompactTargets(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _compact_block(scaled: Tensor, depth: int, sample_size: int, start: Tensor) -> CompactTargets:
    top, ids = top_ranked(scaled, depth)
    highest = top[:, :1] if depth else scaled.amax(1, keepdim=True)
    mass = (scaled - highest).exp_()
    total = mass.sum(1, keepdim=True)
    log_normaliser = highest + total.log()
    # A masked class has a logit of -inf, and adds nothing to the entropy.
    lowest = torch.finfo(scaled.dtype).min
    entropy = log_normaliser[:, 0] - torch.linalg.vecdot(mass, scaled.clamp_min(lowest)) / total[:, 0]
    cumulative = mass.scatter_(1, ids, 0).cumsum(1)
    tail = cumulative[:, -1:]
    if start.shape[1] == 1:
        start = (start + torch.arange(sample_size, device=start.device)) / max(1, sample_size)
    # A point stays below the sum, whatever the rounding: the first class to exceed the point then has a probability.
    points = torch.minimum(start.sort(1).values * tail, torch.nextafter(tail, torch.zeros_like(tail)))
    stored_ids = torch.searchsorted(cumulative, points, right=True)
    # Where the probabilities of the tail underflow to zero, no class exceeds a point.
    stored_ids = torch.where(tail > 0, stored_ids, _first_unranked(ids)[:, None])
    return CompactTargets(
        ids,
        top - log_normaliser,
        stored_ids,
        (tail / total).log()[:, 0],
        entropy.clamp_min(0),
        log_normaliser[:, 0],
    )


def _first_unranked(ids: Tensor) -> Tensor:
    """Finds the lowest class that is not among the ranked classes of each item: ``[n]`` for ``[n, m]``, m < C."""
    in_order = ids.sort(1).values
    return (in_order == torch.arange(ids.shape[1], device=ids.device)).cumprod(1).sum(1)


@dataclass(frozen=True)
class TargetLayout:
    """The layout of an item's targets in bytes, the same number for every item.

    The least significant bit and byte come first. First are m + T ids of ``id_bits`` bits each, filled up to a whole
    byte. Then follow m log-probabilities, the log tail mass and the entropy in float16, and the log-normaliser in
    float32.

    Args:
        num_classes: C.
        depth: m, at most C.
        sample_size: T.
    """

    num_classes: int
    depth: int
    sample_size: int

    @classmethod
    def within(cls, num_bytes: int, num_classes: int, depth: int) -> TargetLayout:
        """Makes a layout with the largest stored sample that fits, of one class per class of the tail at most.

        Args:
            num_bytes: per item, at most.
            num_classes: C.
            depth: m.

        Returns:
            the layout; its ``sample_size`` is below 0 where the ranked classes do not fit.
        """
        ranked = cls(num_classes, depth, 0)
        left = 8 * (num_bytes - 2 * depth - 8) - depth * ranked.id_bits
        return cls(num_classes, depth, min(left // ranked.id_bits, num_classes - depth))

    @property
    def id_bits(self) -> int:
        """Bits of a class id."""
        return max(1, (self.num_classes - 1).bit_length())

    @property
    def num_stored(self) -> int:
        """m + T, the ids of an item."""
        return self.depth + self.sample_size

    @property
    def id_bytes(self) -> int:
        """Bytes of an item's ids."""
        return -(-self.num_stored * self.id_bits // 8)

    @property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        return self.id_bytes + 2 * self.depth + 8

    def pack(self, targets: CompactTargets) -> Tensor:
        """Packs the targets of n items into bytes: uint8, ``[n, item_bytes]``."""
        halves = torch.cat([targets.log_probs, targets.log_tail_mass[:, None], targets.entropy[:, None]], 1)
        parts = [
            pack_integers(torch.cat([targets.ids, targets.stored_ids], 1), self.id_bits),
            halves.half().view(torch.uint8),
            targets.log_normaliser[:, None].float().view(torch.uint8),
        ]
        return torch.cat(parts, 1)

    def unpack(self, packed: Tensor) -> CompactTargets:
        """Unpacks targets from uint8 ``[n, item_bytes]``, the reverse of :meth:`pack`; numbers are float32."""
        if uses_triton(packed.device):
            from hf_dis.teacher.triton_stored import unpack_targets

            return CompactTargets(*unpack_targets(packed, self.depth, self.sample_size, self.id_bits))
        ids, halves, normaliser = packed.split([self.id_bytes, 2 * self.depth + 4, 4], 1)
        ids = unpack_integers(ids, self.num_stored, self.id_bits)
        log_probs, log_tail_mass, entropy = _numbers(halves, torch.float16).split([self.depth, 1, 1], 1)
        return CompactTargets(
            ids[:, : self.depth],
            log_probs,
            ids[:, self.depth :],
            log_tail_mass[:, 0],
            entropy[:, 0],
            _numbers(normaliser, torch.float32)[:, 0],
        )


def _numbers(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Reads bytes ``[n, bytes]`` as numbers of a type; float32."""
    # A plain copy of a single item keeps the stride of its item, which may not be a multiple of a number's bytes.
    return packed.clone(memory_format=torch.contiguous_format).view(dtype).float()


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Packs integers as a stream of bits per item.

    Args:
        values: within 0..2^bits - 1, ``[n, k]``.
        bits: of an integer, at most 33.

    Returns:
        uint8, ``[n, ceil(k bits / 8)]``.
    """
    first = torch.arange(values.shape[1], device=values.device) * bits
    spanned = (bits + 14) // 8
    stream = values.new_zeros(len(values), -(-values.shape[1] * bits // 8) + spanned)
    shifted = values << first % 8
    for place in range(spanned):
        stream.index_add_(1, first // 8 + place, shifted >> 8 * place & 255)
    return stream[:, :-spanned].to(torch.uint8)


def unpack_integers(packed: Tensor, count: int, bits: int) -> Tensor:
    """Unpacks integers, the reverse of :func:`pack_integers`.

    Args:
        packed: uint8, ``[n, ceil(count bits / 8)]``.
        count: k, integers per item.
        bits: of an integer.

    Returns:
        int64, ``[n, k]``.
    """
    if not count:  # torch refuses the view of no bytes as numbers
        return packed.new_empty(len(packed), 0, dtype=torch.long)
    first = torch.arange(count, device=packed.device) * bits
    places = ((first // 8)[:, None] + torch.arange(8, device=packed.device)).flatten()
    eight = F.pad(packed, (0, 8)).gather(1, places.expand(len(packed), -1))
    return eight.view(torch.int64) >> first % 8 & 2**bits - 1
