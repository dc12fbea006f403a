"""Drawing classes: inclusion probabilities, the two samplers, and the draw that one training step works on.

A draw is made of up to three strata: classes drawn from each row's teacher ranking, the row's label, and a tail
that all rows share. Each stratum carries importance weights ω = 1/π (π: the probability that the class is in the
draw) and the teacher's exact mass, so that the losses need nothing else. Capped probability-proportional-to-size
sampling and the strata are this project's; drawing with replacement is the setting of arXiv 1812.00914.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_sampling_arguments, require
from .proposal import DISProposal, Proposal, Statistics, TeacherProposal, TopKProposal

if TYPE_CHECKING:
    from .teachers import TeacherTargets


@dataclass(frozen=True)
class ClassDraw:
    """The classes of one step: ``R`` per-row columns (K ranked, then the label's if there is one), ``K_t`` shared.

    Attributes:
        row_ids: class ids drawn for each row, ``[N, R]``.
        shared_ids: class ids drawn once for all rows, ``[K_t]``.
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

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def label_column(self) -> int:
        return self.row_ids.shape[1] - 1

    @staticmethod
    def cat(draws: Sequence[ClassDraw]) -> ClassDraw:
        """Joins the draws of consecutive chunks of rows; they have the tail and the layout in common."""
        if len(draws) == 1:
            return draws[0]
        summed = sum(draw.class_mass for draw in draws)
        whole = ("shared_ids", "class_mass", "has_label")
        per_row = [field.name for field in fields(ClassDraw) if field.name not in whole]
        joined = {name: torch.cat([vars(draw)[name] for draw in draws]) for name in per_row}
        return replace(draws[0], class_mass=summed, **joined)


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
    is_capped = torch.zeros_like(density, dtype=torch.bool).scatter_(-1, order, capped.expand_as(order))
    return torch.where(is_capped, 1.0, kappa.gather(-1, num_capped) * density).clamp(0, 1)


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


def draw_shared(density: Tensor, num_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws the tail that all rows of a step share: ``num_draws`` distinct classes by capped PPS.

    Args:
        density: over classes, positive, ``[C]``.
        num_draws: K_t.
        generator: a CPU generator.

    Returns:
        class ids ``[min(K_t, C)]``, ascending, and their π (float64).
    """
    num_draws = min(num_draws, len(density))
    expected = inclusion_probabilities(density, num_draws)
    points = systematic_points(1, num_draws, generator)[0].to(density.device, non_blocking=True)
    ids = torch.searchsorted(expected.cumsum(0), points, right=True).clamp(max=len(density) - 1)
    return ids, expected[ids]


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


def is_member(ids: Tensor, shared_ids: Tensor) -> Tensor:
    """Which of the ascending ``shared_ids [K_t]`` each row holds among ``ids [N, m]``: bool, ``[N, K_t]``."""
    num_shared = len(shared_ids)
    held = torch.zeros(len(ids), num_shared + 1, dtype=torch.bool, device=ids.device)
    if num_shared:
        column = torch.searchsorted(shared_ids, ids).clamp(max=num_shared - 1)
        held.scatter_(1, torch.where(shared_ids[column] == ids, column, num_shared), True)
    return held[:, :num_shared]


def estimated_target(log_probs: Tensor, log_weights: Tensor, certain: Tensor, mass: Tensor) -> Tensor:
    """The teacher's probabilities in one stratum, estimated so that they sum to its exact mass.

    Certain classes keep their probability; the others share what is left of the mass in proportion to ω·p (a ratio
    estimator). Where nothing was drawn that could carry the rest, it is left out.

    Args:
        log_probs, log_weights, certain: ``[N, K]``; a column with weight ``-inf`` is not used.
        mass: the teacher's probability of the whole stratum, ``[N]``.
    """
    used = log_weights > -torch.inf
    exact = log_probs.exp().masked_fill(~(certain & used), 0)
    rest = (mass - exact.sum(1)).clamp_min(0)
    score = (log_probs + log_weights).masked_fill(certain | ~used, -torch.inf)
    share = score.softmax(1).nan_to_num(0)
    return exact + share * rest[:, None]


class ClassSampler:
    """Draws the classes of a step from a proposal, in one of two layouts.

    - ``num_shared = 0``: K classes for each row over all C ranks, the setting of arXiv 1812.00914.
    - ``num_shared = K_t``: K of each row's m best-ranked classes, and one tail of K_t classes for all rows.

    Args:
        proposal: where to draw, see :mod:`hf_dis.proposal`.
        num_classes: C.
        num_sampled: K, classes drawn for each row.
        num_shared: K_t, classes drawn once for all rows; 0 for the per-row layout.
        rank_depth: m, the depth to which the teacher's ranking is resolved.
        sampler: ``"pps"`` or ``"replacement"``; the latter only with ``num_shared = 0``.
        seed: of the sampler's own generator; give every process its own.
    """

    def __init__(
        self,
        proposal: Proposal,
        num_classes: int,
        num_sampled: int,
        num_shared: int,
        rank_depth: int,
        sampler: str = "pps",
        seed: int = 0,
    ):
        self.proposal = proposal
        self.rank_depth = min(rank_depth, num_classes)
        self.num_shared = num_shared if self.rank_depth < num_classes else 0
        self.num_ranks = self.rank_depth if self.num_shared else num_classes
        self.num_sampled = min(num_sampled, self.num_ranks)
        self.sampler = sampler
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def columns(self) -> int:
        """Student logits computed for each row, the label's aside: K + K_t."""
        return self.num_sampled + min(self.num_shared, self.proposal.num_classes)

    def draw(self, teacher: Iterable[TeacherTargets], labels: Tensor | None = None) -> ClassDraw:
        """Draws for all rows of a step.

        Args:
            teacher: the rows' ranked targets, chunk by chunk; each chunk is dropped before the next is made.
            labels: class ids ``[N]``, always in the draw if given.
        """
        tail = None
        if self.num_shared:
            tail = draw_shared(self.proposal.class_density(), self.num_shared, self.generator)
        draws, first_row = [], 0
        for targets in teacher:
            rows = slice(first_row, first_row + len(targets))
            draws.append(self._draw_chunk(targets, tail, None if labels is None else labels[rows]))
            first_row = rows.stop
        return ClassDraw.cat(draws)

    def _draw_chunk(
        self, targets: TeacherTargets, tail: tuple[Tensor, Tensor] | None, labels: Tensor | None
    ) -> ClassDraw:
        ranks, log_weights, certain = draw_ranks(
            self.proposal.rank_density(targets),
            self.num_ranks,
            len(targets),
            self.num_sampled,
            self.sampler,
            self.generator,
        )
        rank_weights = log_weights.exp()
        row_ids = ranks_to_classes(ranks, targets.ids)
        log_probs = targets.log_prob(row_ids)
        if tail is None:
            shared_ids = row_ids.new_empty(0)
            shared_log_weights = log_weights.new_empty(len(targets), 0)
            mass = log_probs.new_ones(len(targets))
        else:
            shared_ids, expected = tail
            shared_log_weights = -expected.log().float().expand(len(targets), -1)
            mass = targets.log_probs.exp().sum(1)
        outside_head = ~is_member(targets.ids, shared_ids)
        shared_log_weights = shared_log_weights.masked_fill(~outside_head, -torch.inf)
        shared_log_probs = targets.log_prob(shared_ids.expand(len(targets), -1))
        shared_mass = 1 - mass

        if labels is not None:
            # The label's class is in the draw for certain, in a column of its own: the others give way to it.
            label = labels[:, None]
            log_weights = log_weights.masked_fill(row_ids == label, -torch.inf)
            shared_log_weights = shared_log_weights.masked_fill(shared_ids == label, -torch.inf)
            label_log_prob = targets.log_prob(label)
            label_prob = label_log_prob[:, 0].exp()
            in_head = (targets.ids == label).any(1) | (tail is None)
            mass, shared_mass = mass - label_prob * in_head, shared_mass - label_prob * ~in_head
        ranked = estimated_target(log_probs, log_weights, certain, mass)
        shared_certain = (shared_log_weights == 0) & outside_head
        shared = estimated_target(shared_log_probs, shared_log_weights, shared_certain, shared_mass)
        if labels is not None:
            row_ids = torch.cat([row_ids, label], 1)
            log_weights = F.pad(log_weights, (0, 1), value=0.0)
            certain = F.pad(certain, (0, 1), value=True)
            log_probs = torch.cat([log_probs, label_log_prob], 1)
            ranked = torch.cat([ranked, label_prob[:, None]], 1)
        target = torch.cat([ranked, shared], 1)
        wants_mass = self.num_shared and self.proposal.wants_class_mass
        return ClassDraw(
            row_ids=row_ids,
            shared_ids=shared_ids,
            log_weights=torch.cat([log_weights, shared_log_weights], 1),
            certain=torch.cat([certain, shared_certain], 1),
            log_probs=torch.cat([log_probs, shared_log_probs], 1),
            target=target / target.sum(1, keepdim=True),
            ranks=ranks,
            rank_weights=rank_weights,
            outside_head=outside_head,
            class_mass=targets.class_mass() if wants_mass else target.new_empty(0),
            has_label=labels is not None,
        )

    def learn(
        self, draw: ClassDraw, disagreement: Tensor, reduce: Callable[[Statistics], Statistics] | None = None
    ) -> None:
        """Lets the proposal learn from a step.

        Args:
            draw: the classes drawn.
            disagreement: s - p at every column, as :func:`hf_dis.losses.sampled_distillation_loss` returns it.
            reduce: sums the statistics over processes; not needed with one.
        """
        with torch.no_grad():
            statistics = self.proposal.statistics(draw, disagreement)
            if statistics:
                self.proposal.update(reduce(statistics) if reduce else statistics)

    def state_dict(self) -> dict[str, Tensor]:
        """The proposal's state and the generator's."""
        return {**self.proposal.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave: the next draw is the one that would have come next."""
        self.generator.set_state(state["generator"])
        self.proposal.load_state_dict(state)


def make_sampler(
    num_classes: int,
    *,
    num_sampled_classes: int = 64,
    num_shared_classes: int = 512,
    rank_depth: int | None = None,
    proposal: str = "dis",
    sampler: str = "pps",
    proposal_floor: float = 0.05,
    proposal_decay: float = 0.95,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ClassSampler:
    """A sampler for C classes; the arguments are those of :class:`hf_dis.DISConfig`.

    Raises:
        ValueError: if an argument is out of its range; says which and what it may be.
    """
    require(num_classes >= 1, "num_classes", num_classes, "1 or more")
    check_sampling_arguments(
        num_sampled_classes=num_sampled_classes,
        num_shared_classes=num_shared_classes,
        rank_depth=rank_depth,
        proposal=proposal,
        sampler=sampler,
        proposal_floor=proposal_floor,
        proposal_decay=proposal_decay,
    )
    # With all classes drawn for each row there is nothing left to share; a truncation has no tail.
    shared = 0 if proposal == "topk" or num_sampled_classes >= num_classes else num_shared_classes
    depth = min(rank_depth or 2 * num_sampled_classes, num_classes)
    if (shared or proposal == "topk") and depth < min(num_sampled_classes, num_classes):
        raise ValueError(
            f"rank_depth is {rank_depth}: the {num_sampled_classes} classes of a row (num_sampled_classes) come from "
            "its best-ranked ones, so it has to be at least as many"
        )
    num_ranks = depth if shared and depth < num_classes else num_classes
    layout = (num_classes, num_ranks, depth)
    if proposal == "dis":
        fitted = DISProposal(*layout, floor=proposal_floor, decay=proposal_decay, device=device)
    elif proposal == "teacher":
        fitted = TeacherProposal(*layout, floor=proposal_floor, decay=proposal_decay, device=device)
    elif proposal == "uniform":
        fitted = Proposal(*layout, device=device)
    else:
        fitted = TopKProposal(*layout, num_sampled=num_sampled_classes, device=device)
    return ClassSampler(fitted, num_classes, num_sampled_classes, shared, depth, sampler, seed)
