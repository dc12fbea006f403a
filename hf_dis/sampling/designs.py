"""Sampling classes: inclusion probabilities, the two samplers, and the sample that one training step works on.

A sample is made of up to three strata: classes sampled from each item's teacher ranking, the item's label, and a tail
that items share. Each stratum carries importance weights ω = 1/π (π: the probability that the class is in the
sample) and the teacher's exact mass, so that the losses need nothing else. Capped probability-proportional-to-size
sampling and the strata are this project's; sampling with replacement is the setting of arXiv 1812.00914.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Towards the π of :class:`Updates`, from below, and any π in (0, 1] is unbiased: four steps come within two percent of
# the number for sizes whose logarithms deviate by four, in half the time of sorting the largest.
CAPPING_STEPS = 4


def inclusion_probabilities(density: Tensor, num_sampled: int, last_size: int = 1) -> Tensor:
    """π = min(1, κ·density), with κ such that ``num_sampled`` classes are expected in the sample.

    Args:
        density: non-negative, not necessarily normalised, ``[..., B]``; positive on at least ``num_sampled``
            classes. Computed in float64.
        num_sampled: K, the number of distinct classes to sample.
        last_size: how many classes the last entry stands for; all others stand for one.

    Returns:
        π of one class of each entry, float64, ``[..., B]``: within [0, 1], exactly 1 where capped, summing over
        all classes to min(K, number of classes).
    """
    density = density.double()
    num_entries = density.shape[-1]
    if num_sampled >= num_entries - 1 + last_size:
        return torch.ones_like(density)
    # At most K entries can be capped, and they are the largest: find how many without sorting the rest.
    top, order = density.topk(min(num_sampled + 1, num_entries), dim=-1)
    size = torch.where(order == num_entries - 1, last_size, 1)
    total = density.sum(-1, keepdim=True) + (last_size - 1) * density[..., -1:]
    capped_mass = F.pad((top * size).cumsum(-1), (1, -1))
    capped_size = F.pad(size.cumsum(-1), (1, -1))
    # κ if the j largest entries are capped; the right j is the first that leaves the next entry below one.
    kappa = (num_sampled - capped_size) / (total - capped_mass).clamp_min(torch.finfo(torch.float64).tiny)
    num_capped = ((kappa * top <= 1) | (capped_size >= num_sampled)).to(torch.uint8).argmax(-1, keepdim=True)
    capped = torch.arange(top.shape[-1], device=density.device) < num_capped
    expected = (kappa.gather(-1, num_capped) * density).clamp_(0, 1)
    return expected.scatter_(-1, order, torch.where(capped, 1.0, expected.gather(-1, order)))


def systematic_points(num_items: int, num_sampled: int, generator: torch.Generator) -> Tensor:
    """A random start in [0, 1) for each item, then steps of one: float64, ``[N, K]``, each item ascending."""
    start = torch.rand(num_items, 1, dtype=torch.float64, generator=generator)
    return start + torch.arange(num_sampled, dtype=torch.float64)


def independent_points(num_items: int, num_sampled: int, generator: torch.Generator) -> Tensor:
    """Independent uniform points in [0, K): float64, ``[N, K]``."""
    return torch.rand(num_items, num_sampled, dtype=torch.float64, generator=generator) * num_sampled


def sample_ranks(
    density: Tensor, num_ranks: int, num_items: int, num_sampled: int, design: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples ranks for every item, with no loop over items and no work that grows with the number of classes.

    Systematic sampling lays the inclusion probabilities end to end on [0, K) and reads off what lies at u, u+1,
    u+2, ...: intervals are at most one long, so the K ranks are distinct, and each is met with probability π.

    Args:
        density: the proposal over ranks, falling, ``[B]`` for all items or ``[N, B]``. The last entry stands for
            all of the ranks ``B-1 .. num_ranks-1``, each with that density.
        num_ranks: ranks to sample from.
        num_items: N.
        num_sampled: K, at most ``num_ranks``.
        design: ``"pps"`` (distinct ranks, capped) or ``"replacement"`` (independent samples).
        generator: a CPU generator; the same state gives the same sample on every device.

    Returns:
        ranks ``[N, K]`` (int64), log-weights ``[N, K]`` (float32), certain ``[N, K]`` (bool).
    """
    last = density.shape[-1] - 1
    last_size = num_ranks - last
    if design == "pps":
        points = systematic_points(num_items, num_sampled, generator)
        expected = inclusion_probabilities(density, num_sampled, last_size)
    else:
        points = independent_points(num_items, num_sampled, generator)
        density = density.double()
        total = density.sum(-1, keepdim=True) + (last_size - 1) * density[..., -1:]
        expected = num_sampled * density / total
    points = points.to(density.device, non_blocking=True)
    cumulative = torch.cat([expected[..., :-1], expected[..., -1:] * last_size], -1).cumsum(-1)
    entry = torch.searchsorted(cumulative, points, right=True).clamp(max=last)
    sampled = expected.expand(num_items, -1).gather(1, entry)
    before_last = (cumulative[..., -2:-1] if last else torch.zeros_like(cumulative)).expand(num_items, 1)
    within_last = ((points - before_last) / expected[..., -1:]).long().clamp(0, last_size - 1)
    ranks = torch.where(entry == last, last + within_last, entry)
    certain = (sampled >= 1) & (design == "pps")
    return ranks, -sampled.log().float(), certain


class Updates(NamedTuple):
    """A sample among the distinct classes that items and tails sampled, made in backward: those that update the head.

    Attributes:
        number: how many.
        start: of the systematic sample, uniform in [0, 1).
    """

    number: int
    start: float

    def sample(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Capped PPS.

        Args:
            sizes: non-negative, ``[E]``; where they are not more than ``number``, all are kept.

        Returns:
            the places of those kept, ascending, and their ω = 1/π in the type of the sizes: ``number`` of them, or
            less where sizes are so uneven that a last step would have capped more.
        """
        if self.number >= len(sizes):
            return torch.arange(len(sizes), device=sizes.device), torch.ones_like(sizes)
        dtype = sizes.dtype
        sizes = sizes.double().clamp_min(torch.finfo(sizes.dtype).tiny)
        scale = self.number / sizes.sum()
        for _ in range(CAPPING_STEPS):
            free = scale * sizes < 1
            scale = (self.number - len(sizes) + free.sum()) / (sizes * free).sum()
        inclusion = (scale * sizes).clamp_(max=1)
        # A place is kept where its stretch of the sum holds a point: never twice, whatever the rounding.
        passed = (inclusion.cumsum(0) + self.start).floor()
        kept = passed.diff(prepend=passed.new_zeros(1)).nonzero()[:, 0]
        return kept, inclusion[kept].reciprocal().to(dtype)


def ranks_to_classes(ranks: Tensor, ranked_ids: Tensor) -> Tensor:
    """Class ids at the given ranks of each item.

    Below the resolved depth m only the set of classes is known, not their order; rank ``m + j`` is taken to be the
    j-th class, by id, outside the item's ranked ones. Costs O(K log m) an item, whatever the number of classes.

    Args:
        ranks: ``[N, K]``.
        ranked_ids: the m best-ranked class ids of each item, best first, ``[N, m]``.
    """
    depth = ranked_ids.shape[1]
    resolved = ranked_ids.gather(1, ranks.clamp(max=depth - 1))
    in_order = ranked_ids.sort(dim=1).values
    unranked_before = (in_order - torch.arange(depth, device=ranks.device)).contiguous()
    below = (ranks - depth).clamp_min(0)
    unresolved = below + torch.searchsorted(unranked_before, below, right=True)
    return torch.where(ranks < depth, resolved, unresolved)
