"""A teacher's answer in a few bytes: the ranked classes as they are, and an unbiased sample of all others.

The m best-ranked classes keep their probability. The rest of the mass is told by T classes, sampled systematically: the
tail's probabilities are laid end to end and read off at T equally spaced points with one random start, so that a class
is met T p / mass times on average and each time stands for mass / T. A tail class therefore costs its id and
nothing else. Switched independently, and with m = 0, this is the estimator of "Sparse Logit Sampling" (RS-KD, ACL 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.teacher.targets import BLOCK_ELEMENTS, top_ranked, widen

# How the stored sample of an item is taken.
STORED_DESIGNS = ("systematic", "independent")


class CompactTargets(NamedTuple):
    """What is kept of a teacher's view of some items, at a temperature.

    Attributes:
        ids: the m best-ranked classes, best first, ``[n, m]``.
        log_probs: their log-probabilities, ``[n, m]``.
        stored_ids: T classes sampled from the others, ascending, each as often as it was sampled, ``[n, T]``.
        log_tail_mass: log-probability of all classes that are not ranked, ``[n]``.
        entropy: of the whole distribution, in nats, ``[n]``.
        log_normaliser: of the teacher's logits over the temperature, ``[n]``: they are log-probability plus this.
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
    """Ranks each item and samples from its tail, by blocks of items that stay in a processor's cache.

    Args:
        logits: the teacher's, ``[n, C]``; finite, or -inf for masked classes.
        temperature: τ > 0.
        depth: m, from 0 to C.
        sample_size: T >= 0.
        generator: a CPU generator; the same state gives the same sample on every device.
        design: ``"systematic"``, or ``"independent"``: T independent samples.
    """
    starts = torch.rand(len(logits), 1 if design == "systematic" else sample_size, generator=generator)
    items = max(1, BLOCK_ELEMENTS // logits.shape[1])
    blocks = [
        _compact_block(widen(part) / temperature, depth, sample_size, start.to(logits.device))
        for part, start in zip(logits.split(items), starts.split(items), strict=True)
    ]
    return CompactTargets(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _compact_block(scaled: Tensor, depth: int, sample_size: int, start: Tensor) -> CompactTargets:
    top, ids = top_ranked(scaled, depth)
    highest = top[:, :1] if depth else scaled.amax(1, keepdim=True)
    mass = (scaled - highest).exp_()
    total = mass.sum(1, keepdim=True)
    log_normaliser = highest + total.log()
    # A masked class has a logit of -inf, and no part in the entropy.
    lowest = torch.finfo(scaled.dtype).min
    entropy = log_normaliser[:, 0] - torch.linalg.vecdot(mass, scaled.clamp_min(lowest)) / total[:, 0]
    cumulative = mass.scatter_(1, ids, 0).cumsum(1)
    tail = cumulative[:, -1:]
    if start.shape[1] == 1:
        start = (start + torch.arange(sample_size, device=start.device)) / max(1, sample_size)
    # Below the sum, whatever the rounding: the first class to exceed a point then has a probability.
    points = torch.minimum(start.sort(1).values * tail, torch.nextafter(tail, torch.zeros_like(tail)))
    stored_ids = torch.searchsorted(cumulative, points, right=True).clamp_(max=scaled.shape[1] - 1)
    return CompactTargets(
        ids,
        top - log_normaliser,
        stored_ids,
        (tail / total).log()[:, 0],
        entropy.clamp_min(0),
        log_normaliser[:, 0],
    )


@dataclass(frozen=True)
class TargetLayout:
    """How the targets of an item are laid out in bytes, the same number for every item.

    In this order, least significant bit and byte first: m + T ids of ``id_bits`` bits each, filled up to a whole
    byte; m log-probabilities, the log tail mass and the entropy in float16; the log-normaliser in float32.

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
        """As many samples as fit into an item of so many bytes, one for each class of the tail at most; below 0 where the
        ranked classes do not fit."""
        ranked = cls(num_classes, depth, 0)
        left = 8 * (num_bytes - 2 * depth - 8) - depth * ranked.id_bits
        return cls(num_classes, depth, min(left // ranked.id_bits, num_classes - depth))

    @property
    def id_bits(self) -> int:
        return max(1, (self.num_classes - 1).bit_length())

    @property
    def num_stored(self) -> int:
        return self.depth + self.sample_size

    @property
    def id_bytes(self) -> int:
        return -(-self.num_stored * self.id_bits // 8)

    @property
    def item_bytes(self) -> int:
        return self.id_bytes + 2 * self.depth + 8

    def pack(self, targets: CompactTargets) -> Tensor:
        """Targets of n items as bytes: uint8, ``[n, item_bytes]``."""
        halves = torch.cat([targets.log_probs, targets.log_tail_mass[:, None], targets.entropy[:, None]], 1)
        parts = [
            pack_integers(torch.cat([targets.ids, targets.stored_ids], 1), self.id_bits),
            halves.half().view(torch.uint8),
            targets.log_normaliser[:, None].float().view(torch.uint8),
        ]
        return torch.cat(parts, 1)

    def unpack(self, packed: Tensor) -> CompactTargets:
        """What :meth:`pack` was given, for uint8 ``[n, item_bytes]``; numbers in float32."""
        ids, halves, normaliser = packed.split([self.id_bytes, 2 * self.depth + 4, 4], 1)
        ids = unpack_integers(ids, self.num_stored, self.id_bits)
        log_probs, log_tail_mass, entropy = halves.clone().view(torch.float16).float().split([self.depth, 1, 1], 1)
        return CompactTargets(
            ids[:, : self.depth],
            log_probs,
            ids[:, self.depth :],
            log_tail_mass[:, 0],
            entropy[:, 0],
            normaliser.clone().view(torch.float32)[:, 0],
        )


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Integers within 0..2^bits - 1, ``[n, k]``, as a stream of bits in each item: uint8, ``[n, ceil(k bits / 8)]``."""
    first = torch.arange(values.shape[1], device=values.device) * bits
    spanned = (bits + 14) // 8
    stream = values.new_zeros(len(values), -(-values.shape[1] * bits // 8) + spanned)
    shifted = values << first % 8
    for place in range(spanned):
        stream.index_add_(1, first // 8 + place, shifted >> 8 * place & 255)
    return stream[:, :-spanned].to(torch.uint8)


def unpack_integers(packed: Tensor, count: int, bits: int) -> Tensor:
    """What :func:`pack_integers` packed: int64, ``[n, count]``."""
    first = torch.arange(count, device=packed.device) * bits
    spanned = (bits + 14) // 8
    padded = F.pad(packed, (0, spanned))
    bytes_of = (padded.gather(1, (first // 8 + place).expand(len(packed), -1)) for place in range(spanned))
    value = sum(part.long() << 8 * place for place, part in enumerate(bytes_of))
    return value >> first % 8 & 2**bits - 1
