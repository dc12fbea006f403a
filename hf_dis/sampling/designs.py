"""Designs: how distinct or independent samples are taken from a density over ranks or classes.

A sampled class carries the importance weight ω = 1/π, where π is its inclusion probability: the probability that the
sample holds the class. Capped sampling in proportion to a size (PPS) is this project's; sampling with replacement is
the setting of arXiv 1812.00914.

Random numbers come from a CPU generator in float64, so that the same state gives the same sample on every device. All
else is computed in the widest type of the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.precision import widest

# Steps towards the π of :class:`Updates`, from below. Any π in (0, 1] is unbiased. Four steps come within two percent
# of the number for sizes whose logarithms deviate by four, in half the time of sorting the largest sizes.
CAPPING_STEPS = 4


def inclusion_probabilities(density: Tensor, num_sampled: int, last_size: int = 1) -> Tensor:
    """π = min(1, κ·density), with κ such that ``num_sampled`` classes are expected in the sample.

    Args:
        density: non-negative, not necessarily normalised, falling, ``[..., B]``; positive on at least ``num_sampled``
            classes.
        num_sampled: K, the number of distinct classes to sample.
        last_size: the number of classes that the last entry stands for; every other entry stands for one class.

    Returns:
        π of one class of each entry, in the widest type of the device, ``[..., B]``. Each π is within [0, 1], and
        exactly 1 where capped. Over all classes they sum to min(K, number of classes).
    """
    density = density.to(widest(density.device))
    if num_sampled >= density.shape[-1] - 1 + last_size:
        return torch.ones_like(density)
    return (capping_scale(density, num_sampled, last_size) * density).clamp_(max=1)


def capping_scale(density: Tensor, num_sampled: int, last_size: int = 1) -> Tensor:
    """κ of :func:`inclusion_probabilities`, ``[..., 1]``; takes its arguments, with fewer classes sampled than exist.

    With the j largest entries capped, κ_j = (K - j) / (sum of the other entries). κ_j rises with j as long as the
    next entry is to be capped, κ_j · density > 1, and falls from there on. So κ is the largest κ_j.
    """
    most = min(num_sampled, density.shape[-1])
    sums = density if last_size == 1 else torch.cat([density[..., :-1], last_size * density[..., -1:]], -1)
    # Summed from the smallest: a difference from the total would be all rounding where few entries hold the mass.
    others = sums.flip(-1).cumsum(-1).flip(-1)[..., :most]
    return (torch.arange(num_sampled, num_sampled - most, -1, device=density.device) / others).amax(-1, keepdim=True)


def systematic_points(
    num_items: int, num_sampled: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Points u, u+1, u+2, ... with a random start u in [0, 1) per item: ascending, ``[N, K]``, on a device.

    The points are of the widest type of the device.
    """
    starts = systematic_starts(num_items, num_sampled, generator, device)
    return starts + torch.arange(num_sampled, device=device)


def systematic_starts(
    num_items: int, num_sampled: int, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """The first of the points of :func:`systematic_points`, ``[N, 1]``."""
    starts = torch.rand(num_items, 1, dtype=torch.float64, generator=generator)
    return to_device(below_one(starts, num_sampled), device)


def below_one(start: Tensor, num_sampled: int) -> Tensor:
    """Keeps starts so far below 1 that no point reaches the next whole number where a device rounds to float32."""
    return start.clamp(max=latest_start(num_sampled))


def latest_start(num_sampled: int) -> float:
    """The highest start of the points u, u+1, ... of which none reaches the next whole number."""
    return 1 - num_sampled * torch.finfo(torch.float32).eps


def independent_points(num_items: int, num_sampled: int, generator: torch.Generator) -> Tensor:
    """Independent uniform points in [0, K): float64, ``[N, K]``."""
    return torch.rand(num_items, num_sampled, dtype=torch.float64, generator=generator) * num_sampled


def to_device(numbers: Tensor, device: torch.device | str) -> Tensor:
    """Brings random numbers from the CPU to a device, in its widest type, without waiting for the device."""
    device = torch.device(device)
    numbers = numbers.to(widest(device))
    if device.type == "cuda":
        numbers = numbers.pin_memory()  # else the host waits for a copy of more than 64 KiB
    return numbers.to(device, non_blocking=True)


def sample_ranks(
    density: Tensor, num_ranks: int, num_items: int, num_sampled: int, design: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples ranks for every item, with no loop over items and no work that grows with the number of classes.

    Systematic sampling lays the inclusion probabilities end to end on [0, K) and reads off the ranks at u, u+1,
    u+2, ... Intervals are at most one long, so the K ranks are distinct, and each rank is met with probability π.

    Args:
        density: the proposal over ranks, falling, ``[B]`` for all items or ``[N, B]``. The last entry is the density
            of each of the ranks ``B-1 .. num_ranks-1``.
        num_ranks: the number of ranks to sample from.
        num_items: N.
        num_sampled: K, at most ``num_ranks``.
        design: ``"pps"`` (distinct ranks, capped) or ``"replacement"`` (independent samples).
        generator: a CPU generator.

    Returns:
        ranks ``[N, K]`` (int64), log-weights ``[N, K]`` (float32), certain ``[N, K]`` (bool).
    """
    last = density.shape[-1] - 1
    last_size = num_ranks - last
    if design == "pps":
        points = systematic_points(num_items, num_sampled, generator, density.device)
        expected = inclusion_probabilities(density, num_sampled, last_size)
    else:
        points = to_device(independent_points(num_items, num_sampled, generator), density.device)
        density = density.to(widest(density.device))
        total = density.sum(-1, keepdim=True) + (last_size - 1) * density[..., -1:]
        expected = num_sampled * density / total
    # The sums before the last entry: all points beyond them are the last entry's, whatever the rounding.
    cumulative = expected[..., :-1].cumsum(-1)
    ranks = entry = torch.searchsorted(cumulative, points, right=True)
    inclusion = expected.expand(num_items, -1).gather(1, entry)
    if last_size > 1:
        before_last = (cumulative[..., -1:] if last else torch.zeros_like(expected)).expand(num_items, 1)
        within_last = ((points - before_last) / expected[..., -1:]).long().clamp(0, last_size - 1)
        ranks = torch.where(entry == last, last + within_last, entry)
    certain = inclusion >= 1 if design == "pps" else torch.zeros_like(entry, dtype=torch.bool)
    log_weights = torch.log(inclusion, out=torch.empty_like(inclusion, dtype=torch.float32)).neg_()
    return ranks, log_weights, certain


class Updates(NamedTuple):
    """The sample, taken in backward, of the classes that update the head among those that items and tails sampled.

    Attributes:
        number: the number of classes in the sample.
        start: start of the systematic sample, uniform in [0, 1).
    """

    number: int
    start: float

    def weights(self, sizes: Tensor, count: Tensor | None = None) -> Tensor:
        """Samples by capped PPS: ω = 1/π of the classes that are kept, 0 of the dropped classes, ``[E]``.

        ``number`` classes are kept, or fewer where sizes are so uneven that further steps would cap more. All classes
        are kept where there are at most ``number``.

        Args:
            sizes: of the classes, non-negative, ``[E]``.
            count: the number of classes, ``[1]``; entries from there on stand for no class. None: E.
        """
        num_entries = len(sizes)
        exists = torch.ones_like(sizes) if count is None else torch.arange(num_entries, device=sizes.device) < count
        if self.number >= num_entries:
            return exists.to(sizes.dtype)
        both = torch.ones(2, num_entries, dtype=widest(sizes.device), device=sizes.device)
        wide = torch.add(sizes, exists, alpha=torch.finfo(sizes.dtype).tiny, out=both[0])
        largest = wide.sum() / self.number  # the size from which on classes are certain, 1 / κ
        added = torch.arange(2, dtype=wide.dtype, device=wide.device)  # to the second sum alone
        for _ in range(CAPPING_STEPS):
            is_free = torch.lt(wide, largest, out=torch.empty_like(wide))
            total, num_uncertain = torch.addmv(added, both, is_free, beta=self.number - num_entries)
            largest = total / num_uncertain
        tiny = torch.finfo(wide.dtype).tiny
        if count is not None:
            largest.masked_fill_(count[0] <= self.number, tiny)  # all are kept
        stretches = wide.new_full((num_entries + 1,), self.start)
        inclusion = torch.div(wide, largest, out=stretches[1:]).clamp_(tiny, 1)
        # A place is kept where its stretch of the sum holds a point: no rounding keeps it twice.
        passed = stretches.cumsum(0).floor_()
        return torch.div(passed[1:] != passed[:-1], inclusion, out=torch.empty_like(sizes))


def ranks_to_classes(ranks: Tensor, ranked_ids: Tensor) -> Tensor:
    """Class ids at the given ranks of each item.

    Below the resolved depth m only the set of classes is known, not their order: rank ``m + j`` stands for the
    j-th class, by id, outside the item's ranked classes. Costs O(K log m) per item, however many classes there are.

    Args:
        ranks: ``[N, K]``.
        ranked_ids: the m best-ranked class ids of each item, best first, ``[N, m]``.

    Returns:
        class ids, ``[N, K]``.
    """
    depth = ranked_ids.shape[1]
    resolved = ranked_ids.gather(1, ranks.clamp(max=depth - 1))
    in_order = ranked_ids.sort(dim=1).values
    unranked_before = (in_order - torch.arange(depth, device=ranks.device)).contiguous()
    below = (ranks - depth).clamp_min(0)
    unresolved = below + torch.searchsorted(unranked_before, below, right=True)
    return torch.where(ranks < depth, resolved, unresolved)
