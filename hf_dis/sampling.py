"""Drawing classes: inclusion probabilities, the two samplers, and the draw that one training step works on.

A draw is made of up to three strata: classes drawn from each row's teacher ranking, the row's label, and a tail
that rows share. Each stratum carries importance weights ω = 1/π (π: the probability that the class is in the
draw) and the teacher's exact mass, so that the losses need nothing else. Capped probability-proportional-to-size
sampling and the strata are this project's; drawing with replacement is the setting of arXiv 1812.00914.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Towards the π of :class:`Updates`, from below, and any π in (0, 1] is unbiased: four steps come within two percent of
# the number for sizes whose logarithms deviate by four, in half the time of sorting the largest.
CAPPING_STEPS = 4


@dataclass(frozen=True)
class ClassDraw:
    """The classes of one step: ``R`` per-row columns (K ranked, then the label's if there is one), ``K_t`` shared.

    There are G tails, and row i uses tail ``i mod G``.

    Attributes:
        row_ids: class ids drawn for each row, ``[N, R]``.
        shared_ids: class ids of each tail, ascending, ``[G, K_t]``.
        log_weights: log ω for every column, ``[N, R + K_t]``; ``-inf`` where a row does not use a column
            because it holds the same class in another.
        certain: whether the class was in the draw with probability one, ``[N, R + K_t]``.
        log_probs: the teacher's log-probabilities at the temperature, ``[N, R + K_t]``.
        target: estimated teacher probabilities, each row sums to one, ``[N, R + K_t]``.
        ranks: the teacher's rank of the K ranked columns, ``[N, K]``, 0 is its favourite.
        rank_weights: ω of the K ranked columns before the label is taken out, ``[N, K]``.
        outside_head: whether a shared class lies outside the row's ranked classes, ``[N, K_t]``.
        class_mass: the teacher's probability of each class outside the rows' ranked ones, summed over rows,
            ``[C]``; empty if the proposal has no use for it.
        has_label: whether column ``R - 1`` is the label's.
        with_replacement: whether a row may hold a class in several of its ranked columns.
        updates: which of the drawn classes update the head; all of them if None.
    """

    row_ids: Tensor
    shared_ids: Tensor
    log_weights: Tensor
    certain: Tensor
    log_probs: Tensor
    target: Tensor
    ranks: Tensor
    rank_weights: Tensor
    outside_head: Tensor
    class_mass: Tensor
    has_label: bool
    with_replacement: bool
    updates: Updates | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def label_column(self) -> int:
        return self.row_ids.shape[1] - 1

    @staticmethod
    def cat(draws: Sequence[ClassDraw]) -> ClassDraw:
        """Joins the draws of consecutive chunks of rows; they have the layout and the tails in common, of which those
        are left out that no row uses."""
        used_tails = draws[0].shared_ids[: max(1, sum(map(len, draws)))]
        if len(draws) == 1:
            return replace(draws[0], shared_ids=used_tails)
        summed = sum(draw.class_mass for draw in draws)
        whole = ("shared_ids", "class_mass", "has_label", "with_replacement", "updates")
        per_row = [field.name for field in fields(ClassDraw) if field.name not in whole]
        joined = {name: torch.cat([vars(draw)[name] for draw in draws]) for name in per_row}
        return replace(draws[0], shared_ids=used_tails, class_mass=summed, **joined)


def inclusion_probabilities(density: Tensor, num_draws: int, last_size: int = 1) -> Tensor:
    """π = min(1, κ·density), with κ such that ``num_draws`` classes are expected in the draw.

    Args:
        density: non-negative, not necessarily normalised, ``[..., B]``; positive on at least ``num_draws``
            classes. Computed in float64.
        num_draws: K, the number of distinct classes to draw.
        last_size: how many classes the last entry stands for; all others stand for one.

    Returns:
        π of one class of each entry, float64, ``[..., B]``: within [0, 1], exactly 1 where capped, summing over
        all classes to min(K, number of classes).
    """
    density = density.double()
    num_entries = density.shape[-1]
    if num_draws >= num_entries - 1 + last_size:
        return torch.ones_like(density)
    # At most K entries can be capped, and they are the largest: find how many without sorting the rest.
    top, order = density.topk(min(num_draws + 1, num_entries), dim=-1)
    size = torch.where(order == num_entries - 1, last_size, 1)
    total = density.sum(-1, keepdim=True) + (last_size - 1) * density[..., -1:]
    capped_mass = F.pad((top * size).cumsum(-1), (1, -1))
    capped_size = F.pad(size.cumsum(-1), (1, -1))
    # κ if the j largest entries are capped; the right j is the first that leaves the next entry below one.
    kappa = (num_draws - capped_size) / (total - capped_mass).clamp_min(torch.finfo(torch.float64).tiny)
    num_capped = ((kappa * top <= 1) | (capped_size >= num_draws)).to(torch.uint8).argmax(-1, keepdim=True)
    capped = torch.arange(top.shape[-1], device=density.device) < num_capped
    expected = (kappa.gather(-1, num_capped) * density).clamp_(0, 1)
    return expected.scatter_(-1, order, torch.where(capped, 1.0, expected.gather(-1, order)))


def systematic_points(num_rows: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """A random start in [0, 1) for each row, then steps of one: float64, ``[N, K]``, each row ascending."""
    start = torch.rand(num_rows, 1, dtype=torch.float64, generator=generator)
    return start + torch.arange(num_draws, dtype=torch.float64)


def independent_points(num_rows: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """Independent uniform points in [0, K): float64, ``[N, K]``."""
    return torch.rand(num_rows, num_draws, dtype=torch.float64, generator=generator) * num_draws


def draw_ranks(
    density: Tensor, num_ranks: int, num_rows: int, num_draws: int, sampler: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws ranks for every row, with no loop over rows and no work that grows with the number of classes.

    Systematic sampling lays the inclusion probabilities end to end on [0, K) and reads off what lies at u, u+1,
    u+2, ...: intervals are at most one long, so the K ranks are distinct, and each is met with probability π.

    Args:
        density: the proposal over ranks, falling, ``[B]`` for all rows or ``[N, B]``. The last entry stands for
            all of the ranks ``B-1 .. num_ranks-1``, each with that density.
        num_ranks: ranks to draw from.
        num_rows: N.
        num_draws: K, at most ``num_ranks``.
        sampler: ``"pps"`` (distinct ranks, capped) or ``"replacement"`` (independent draws).
        generator: a CPU generator; the same state gives the same draw on every device.

    Returns:
        ranks ``[N, K]`` (int64), log-weights ``[N, K]`` (float32), certain ``[N, K]`` (bool).
    """
    last = density.shape[-1] - 1
    last_size = num_ranks - last
    if sampler == "pps":
        points = systematic_points(num_rows, num_draws, generator)
        expected = inclusion_probabilities(density, num_draws, last_size)
    else:
        points = independent_points(num_rows, num_draws, generator)
        density = density.double()
        total = density.sum(-1, keepdim=True) + (last_size - 1) * density[..., -1:]
        expected = num_draws * density / total
    points = points.to(density.device, non_blocking=True)
    cumulative = torch.cat([expected[..., :-1], expected[..., -1:] * last_size], -1).cumsum(-1)
    entry = torch.searchsorted(cumulative, points, right=True).clamp(max=last)
    drawn = expected.expand(num_rows, -1).gather(1, entry)
    before_last = (cumulative[..., -2:-1] if last else torch.zeros_like(cumulative)).expand(num_rows, 1)
    within_last = ((points - before_last) / expected[..., -1:]).long().clamp(0, last_size - 1)
    ranks = torch.where(entry == last, last + within_last, entry)
    certain = (drawn >= 1) & (sampler == "pps")
    return ranks, -drawn.log().float(), certain


class Tails(NamedTuple):
    """The tails of a step: row i uses tail ``i mod G``.

    Attributes:
        ids: class ids, ascending in each tail, ``[G, K_t]``.
        inclusion: their π, float64, ``[G, K_t]``.
    """

    ids: Tensor
    inclusion: Tensor

    def of_rows(self, first_row: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Class ids, log ω and whether the class is certain, for consecutive rows: ``[n, K_t]`` each."""
        parts = self.ids, -self.inclusion.log().float(), self.inclusion >= 1
        return tuple(of_rows(part, first_row, num_rows) for part in parts)


def of_rows(tails: Tensor, first_row: int, num_rows: int) -> Tensor:
    """What consecutive rows find in their tails: ``[n, K_t]`` for ``[G, K_t]``."""
    if len(tails) == 1:
        return tails.expand(num_rows, -1)
    return tails.index_select(0, torch.arange(first_row, first_row + num_rows, device=tails.device) % len(tails))


def by_tail(rows: Tensor, num_tails: int) -> Tensor:
    """The rows of each tail: ``[G, n, ...]`` for ``[N, ...]``, with zeros where a tail has a row less than others."""
    missing = -len(rows) % num_tails
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.unflatten(0, (len(rows) // num_tails, num_tails)).transpose(0, 1)


def by_row(tails: Tensor, num_rows: int) -> Tensor:
    """What :func:`by_tail` made of the rows, in their order again: ``[N, ...]`` for ``[G, n, ...]``."""
    return tails.transpose(0, 1).flatten(0, 1)[:num_rows]


def draw_shared(density: Tensor, num_draws: int, num_tails: int, generator: torch.Generator) -> Tails:
    """Draws the tails that the rows of a step share, each ``num_draws`` distinct classes by capped PPS.

    The tails are evenly spaced systematic samples of one random start: together they hold as many different classes
    as they can, and their errors balance where a gradient is summed over rows.

    Args:
        density: over classes, positive, ``[C]``.
        num_draws: K_t; where there are not more classes, one tail of all of them.
        num_tails: G.
        generator: a CPU generator.
    """
    num_classes = len(density)
    if num_draws >= num_classes:
        ids = torch.arange(num_classes, device=density.device)[None]
        return Tails(ids, torch.ones_like(ids, dtype=torch.float64))
    density = density.double()
    # At most K_t classes can be capped, and they are the largest; all others are one entry of their mean size.
    largest = density.topk(num_draws).values
    num_others = num_classes - num_draws
    others = (density.sum() - largest.sum()) / num_others
    scale = inclusion_probabilities(torch.cat([largest, others[None]]), num_draws, num_others)[-1] / others
    # In units of the density: the classes' shares end to end, and the points on them.
    start = torch.rand(1, dtype=torch.float64, generator=generator)
    starts = (start + torch.arange(num_tails, dtype=torch.float64) / num_tails) % 1
    points = starts[:, None] + torch.arange(num_draws)
    points = points.to(density.device, non_blocking=True) / scale
    ids = torch.searchsorted(density.clamp_max(1 / scale).cumsum(0), points, right=True).clamp(max=num_classes - 1)
    return Tails(ids, (scale * density.take(ids)).clamp_(max=1))


class Updates(NamedTuple):
    """A draw among the distinct classes that rows and tails drew, made in backward: those that update the head.

    Attributes:
        number: how many.
        start: of the systematic sample, uniform in [0, 1).
    """

    number: int
    start: float

    def draw(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
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
    """Class ids at the given ranks of each row.

    Below the resolved depth m only the set of classes is known, not their order; rank ``m + j`` is taken to be the
    j-th class, by id, outside the row's ranked ones. Costs O(K log m) a row, whatever the number of classes.

    Args:
        ranks: ``[N, K]``.
        ranked_ids: the m best-ranked class ids of each row, best first, ``[N, m]``.
    """
    depth = ranked_ids.shape[1]
    resolved = ranked_ids.gather(1, ranks.clamp(max=depth - 1))
    in_order = ranked_ids.sort(dim=1).values
    unranked_before = (in_order - torch.arange(depth, device=ranks.device)).contiguous()
    below = (ranks - depth).clamp_min(0)
    unresolved = below + torch.searchsorted(unranked_before, below, right=True)
    return torch.where(ranks < depth, resolved, unresolved)


def is_member(ids: Tensor, shared_ids: Tensor, first_row: int = 0) -> Tensor:
    """Which classes of its tail each row holds among its own.

    Args:
        ids: classes of consecutive rows, ``[n, m]``.
        shared_ids: of each tail, ascending, ``[G, K_t]``.
        first_row: where the rows are in the batch.

    Returns:
        bool, ``[n, K_t]``.
    """
    num_tails, num_shared = shared_ids.shape
    shared_ids = shared_ids.roll(-first_row, 0)  # that of the first row is the first
    rows = by_tail(ids, num_tails)
    held = torch.zeros(*rows.shape[:2], num_shared + 1, dtype=torch.bool, device=ids.device)
    if num_shared:
        flat = rows.flatten(1)
        column = torch.searchsorted(shared_ids, flat).clamp(max=num_shared - 1)
        column = torch.where(shared_ids.gather(1, column) == flat, column, num_shared)
        held.scatter_(2, column.view(rows.shape), True)
    return by_row(held, len(ids))[:, :num_shared]


class Stratum(NamedTuple):
    """Columns of a draw among which the teacher's exact mass is known.

    Attributes:
        ids: classes, ``[N, K]``.
        log_weights: log ω, ``[N, K]``; ``-inf`` where a column is not used.
        certain: whether the class is in the draw with probability one, ``[N, K]``.
        log_probs: the teacher's, ``[N, K]``.
        mass: the teacher's probability of all classes that could have been drawn, ``[N]``.
    """

    ids: Tensor
    log_weights: Tensor
    certain: Tensor
    log_probs: Tensor
    mass: Tensor

    def without(self, label: Stratum, held: Tensor) -> Stratum:
        """Gives way to the label's column: the class is not used here, and where held its mass is taken out."""
        log_weights = self.log_weights.masked_fill(self.ids == label.ids, -torch.inf)
        return self._replace(log_weights=log_weights, mass=self.mass - label.mass * held)

    def target(self) -> Tensor:
        """The teacher's probabilities, estimated so that they sum to the mass, ``[N, K]``.

        Certain classes keep their probability; the others share what is left of the mass in proportion to ω·p (a
        ratio estimator). Where nothing was drawn that could carry the rest, it is left out.
        """
        used = self.log_weights > -torch.inf
        exact = self.log_probs.exp().masked_fill(~(self.certain & used), 0)
        rest = (self.mass - exact.sum(1)).clamp_min(0)
        score = (self.log_probs + self.log_weights).masked_fill(self.certain | ~used, -torch.inf)
        return exact + score.softmax(1).nan_to_num(0) * rest[:, None]
