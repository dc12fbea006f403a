"""Shared tails of several processes, sampled from a density over classes of which each process has a part.

Each process has tails of its own. Nothing that is sent grows with the number of classes: the largest densities and the
sum of each part, the starts of the tails, and the sampled classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from hf_dis.precision import widest
from hf_dis.sampling.designs import below_one, to_device
from hf_dis.sampling.tails import ClassDensity, Tails, every_class, sample_tails, share_of_certain

if TYPE_CHECKING:
    from hf_dis.head.vocab_shard import VocabShard


def sample_sharded_tails(
    density: ClassDensity,
    shard: VocabShard | None,
    num_classes: int,
    num_sampled: int,
    num_tails: int,
    generator: torch.Generator,
) -> Tails:
    """Samples tails as :func:`hf_dis.sampling.tails.sample_tails` does, from the densities of all processes.

    Every process has to call this. The sums of the density are those of parts, so that they are rounded differently.

    Args:
        density: over the classes of the shard.
        shard: of this process; None: it has all classes.
        num_classes: C.
        num_sampled: K_t.
        num_tails: G.
        generator: a CPU generator of this process.

    Returns:
        the tails of this process.
    """
    if shard is None or shard.number == 1:
        return sample_tails(density, num_sampled, num_tails, generator)
    if num_sampled >= num_classes:
        return every_class(num_classes, density.values.device)
    device = density.values.device
    values = density.values.to(widest(device))
    start = torch.rand(1, dtype=torch.float64, generator=generator)
    starts = below_one((start + torch.arange(num_tails, dtype=torch.float64) / num_tails) % 1, num_sampled)
    numbers = to_device(torch.arange(1, num_sampled + 1), device)
    largest = values.topk(min(num_sampled, len(values))).values
    largest = shard.gather(F.pad(largest, (0, num_sampled - len(largest)))).flatten().topk(num_sampled).values
    most = share_of_certain(shard.sum(values.sum()), largest, numbers, num_classes)
    shares = values.clamp_max(most)
    cumulative = shares.cumsum(0)
    ends = shard.gather(cumulative[-1]).cumsum(0)
    points = (shard.gather(to_device(starts, device))[..., None] - 1 + numbers).mul_(most)
    # Every process finds the same owner of a point, so that each point is answered once.
    owner = torch.searchsorted(ends, points.flatten(), right=True).clamp_(max=shard.number - 1).view(points.shape)
    is_own = owner == shard.index
    before = ends[shard.index] - cumulative[-1]
    places = torch.searchsorted(cumulative, points[is_own] - before, right=True).clamp_(max=len(values) - 1)
    ids = torch.zeros_like(points, dtype=torch.int32).masked_scatter_(is_own, (places + shard.start).int())
    inclusion = torch.zeros_like(points).masked_scatter_(is_own, shares.take(places).div_(most))
    ids, inclusion = (shard.exchange(one.flatten()).view(one.shape).sum(0) for one in (ids, inclusion))
    return Tails(ids.long(), inclusion)
