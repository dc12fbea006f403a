"""Shared tails of several processes, sampled from a density over classes of which each process has a part.

Each process has tails of its own. Nothing that is sent grows with the number of classes: the largest densities and the
sum of each part, the starts of the tails, and the sampled classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.precision import widest
from hf_dis.sampling.designs import below_one, to_device
from hf_dis.sampling.tails import ClassDensity, Tails, every_class, largest_densities, sample_tails, share_of_certain

if TYPE_CHECKING:
    from hf_dis.head.vocab_shard import VocabShard


class Points(NamedTuple):
    """The capped densities of all processes end to end: a class has a part as long as its density.

    Attributes:
        values: the densities of this process, in the widest type of the device, ``[S]``.
        num_sampled: K_t.
        most: the density from which on a class is certain, a scalar.
        cumulative: of the capped densities of this process, ``[S]``.
        ends: where the part of each process ends, ``[R]``.
    """

    values: Tensor
    num_sampled: int
    most: Tensor
    cumulative: Tensor
    ends: Tensor


class ShardedTails:
    """Samples tails as :func:`hf_dis.sampling.tails.sample_tails` does, from the densities of all processes.

    Keeps the passes over all classes for as long as the density stays the same.

    Args:
        shard: of this process; None: it has all classes.
        num_classes: C.
    """

    def __init__(self, shard: VocabShard | None, num_classes: int):
        self.shard, self.num_classes = shard, num_classes
        self._points: Points | None = None

    def sample(self, density: ClassDensity, num_sampled: int, num_tails: int, generator: torch.Generator) -> Tails:
        """Samples the tails of this process.

        Every process has to call this. Sums of the density are those of parts, so that they are rounded differently.

        Args:
            density: over the classes of the shard; the tensor of an earlier call has the values of that call.
            num_sampled: K_t.
            num_tails: G.
            generator: a CPU generator of this process.
        """
        shard, values = self.shard, density.values
        if shard is None or shard.number == 1:
            return sample_tails(density, num_sampled, num_tails, generator)
        if num_sampled >= self.num_classes:
            return every_class(self.num_classes, values.device)
        start = torch.rand(1, dtype=torch.float64, generator=generator)
        starts = below_one((start + torch.arange(num_tails, dtype=torch.float64) / num_tails) % 1, num_sampled)
        if self._points is None or self._points.values is not values or self._points.num_sampled != num_sampled:
            self._points = None  # freed before those of the new density are made
            self._points = _points(values, num_sampled, shard, self.num_classes)
        return _at_points(self._points, to_device(starts, values.device), shard)


def _points(values: Tensor, num_sampled: int, shard: VocabShard, num_classes: int) -> Points:
    """The passes over all classes."""
    values = values.to(widest(values.device))
    largest = largest_densities(values, min(num_sampled, len(values)))
    largest = shard.gather(F.pad(largest, (0, num_sampled - len(largest)))).flatten().topk(num_sampled).values
    numbers = to_device(torch.arange(1, num_sampled + 1), values.device)
    most = share_of_certain(shard.sum(values.sum()), largest, numbers, num_classes)
    cumulative = values.clamp_max(most).cumsum(0)
    return Points(values, num_sampled, most, cumulative, shard.gather(cumulative[-1]).cumsum(0))


def _at_points(given: Points, starts: Tensor, shard: VocabShard) -> Tails:
    """The classes at evenly spaced points, from the start of each tail on.

    Args:
        given: the passes over all classes.
        starts: in [0, 1), ``[G]``.
        shard: of this process.
    """
    values, num_sampled, most, cumulative, ends = given
    numbers = to_device(torch.arange(1, num_sampled + 1), values.device)
    points = (shard.gather(starts)[..., None] - 1 + numbers).mul_(most)
    # Every process finds the same owner of a point, so that each point is answered once.
    owner = torch.searchsorted(ends, points.flatten(), right=True).clamp_(max=shard.number - 1).view(points.shape)
    is_own = owner == shard.index
    before = ends[shard.index] - cumulative[-1]
    places = torch.searchsorted(cumulative, points[is_own] - before, right=True).clamp_(max=len(values) - 1)
    ids = torch.zeros_like(points, dtype=torch.int32).masked_scatter_(is_own, (places + shard.start).int())
    found = values.take(places).clamp_max_(most).div_(most)
    inclusion = torch.zeros_like(points).masked_scatter_(is_own, found)
    ids, inclusion = (shard.exchange(one.flatten()).view(one.shape).sum(0) for one in (ids, inclusion))
    return Tails(ids.long(), inclusion)
