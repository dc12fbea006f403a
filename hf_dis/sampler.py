"""ClassSampler: a proposal and a layout, drawing the classes of a step and learning from what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import check_sampling_arguments, require, require_number
from .proposal import DISProposal, Proposal, Statistics, TeacherProposal, TopKProposal
from .sampling import ClassDraw, Stratum, Tails, Updates, draw_ranks, draw_shared, is_member, ranks_to_classes

if TYPE_CHECKING:
    from .targets import TeacherTargets


class ClassSampler:
    """Draws the classes of a step from a proposal, in one of two layouts.

    - ``num_shared = 0``: K classes for each row over all C ranks, the setting of arXiv 1812.00914.
    - ``num_shared = K_t``: K of each row's m best-ranked classes, and a tail of K_t classes that rows share.

    Args:
        proposal: where to draw, see :mod:`hf_dis.proposal`.
        num_classes: C.
        num_sampled: K, classes drawn for each row.
        num_shared: K_t, classes of a tail; 0 for the per-row layout.
        num_tails: G, tails of a step: row i uses tail ``i mod G``.
        rank_depth: m, the depth to which the teacher's ranking is resolved.
        sampler: ``"pps"`` or ``"replacement"``; the latter only with ``num_shared = 0``.
        num_updated: U: at most U N of the distinct drawn classes update the head; all of them if None.
        seed: of the sampler's own generator; give every process its own.
    """

    def __init__(
        self,
        proposal: Proposal,
        num_classes: int,
        num_sampled: int,
        num_shared: int,
        num_tails: int,
        rank_depth: int,
        sampler: str = "pps",
        num_updated: int | None = None,
        seed: int = 0,
    ):
        self.proposal = proposal
        self.rank_depth = min(rank_depth, num_classes)
        self.num_shared = min(num_shared, num_classes) if self.rank_depth < num_classes else 0
        self.num_tails = num_tails if self.num_shared else 1
        self.num_ranks = self.rank_depth if self.num_shared else num_classes
        self.num_sampled = min(num_sampled, self.num_ranks)
        self.sampler, self.num_updated = sampler, num_updated
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def columns(self) -> int:
        """Student logits computed for each row, the label's aside: K + K_t."""
        return self.num_sampled + self.num_shared

    def draw(self, teacher: Iterable[TeacherTargets], labels: Tensor | None = None) -> ClassDraw:
        """Draws for all rows of a step.

        Args:
            teacher: the rows' ranked targets, chunk by chunk; each chunk is dropped before the next is made.
            labels: class ids ``[N]``, always in the draw if given.
        """
        if self.num_shared:
            tails = draw_shared(self.proposal.class_density(), self.num_shared, self.num_tails, self.generator)
        else:
            none = torch.empty(1, 0, dtype=torch.long, device=self.proposal.device)
            tails = Tails(none, none.double())
        draws, first_row = [], 0
        for targets in teacher:
            rows = slice(first_row, first_row + len(targets))
            draws.append(self._draw_chunk(targets, tails, first_row, None if labels is None else labels[rows]))
            first_row = rows.stop
            del targets  # the next chunk is computed without this one in memory
        draw = ClassDraw.cat(draws)
        if self.num_updated is None:
            return draw
        start = torch.rand((), dtype=torch.float64, generator=self.generator)
        return replace(draw, updates=Updates(self.num_updated * len(draw), float(start)))

    def _draw_chunk(self, targets: TeacherTargets, tails: Tails, first_row: int, labels: Tensor | None) -> ClassDraw:
        num_rows = len(targets)
        ranks, log_weights, certain = draw_ranks(
            self.proposal.rank_density(targets),
            self.num_ranks,
            num_rows,
            self.num_sampled,
            self.sampler,
            self.generator,
        )
        ids = ranks_to_classes(ranks, targets.ids)
        head_mass = targets.log_probs.exp().sum(1)
        if not self.num_shared:
            head_mass = torch.ones_like(head_mass)
        ranked = Stratum(ids, log_weights, certain, targets.log_prob(ids), head_mass)

        shared_ids, shared_weights, shared_certain = tails.of_rows(first_row, num_rows)
        outside_head = ~is_member(targets.ids, tails.ids, first_row)
        shared = Stratum(
            ids=shared_ids,
            log_weights=shared_weights.masked_fill(~outside_head, -torch.inf),
            certain=shared_certain,
            log_probs=targets.log_prob(shared_ids),
            mass=1 - head_mass,
        )
        strata = [ranked, shared]
        if labels is not None:
            label = labels[:, None]
            log_prob = targets.log_prob(label)
            zero = torch.zeros_like(label, dtype=torch.float32)
            own = Stratum(label, zero, torch.ones_like(label, dtype=torch.bool), log_prob, log_prob[:, 0].exp())
            in_head = (targets.ids == label).any(1) | (not self.num_shared)
            strata = [ranked.without(own, in_head), own, shared.without(own, ~in_head)]

        target = torch.cat([stratum.target() for stratum in strata], 1)
        wants_mass = self.num_shared and self.proposal.wants_class_mass
        return ClassDraw(
            row_ids=torch.cat([stratum.ids for stratum in strata[:-1]], 1),
            shared_ids=tails.ids,
            log_weights=torch.cat([stratum.log_weights for stratum in strata], 1),
            certain=torch.cat([stratum.certain for stratum in strata], 1),
            log_probs=torch.cat([stratum.log_probs for stratum in strata], 1),
            # All zero where only classes that the teacher gives nothing were drawn: the row then says nothing.
            target=target / target.sum(1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny),
            ranks=ranks,
            rank_weights=log_weights.exp(),
            outside_head=outside_head,
            class_mass=targets.class_mass() if wants_mass else target.new_empty(0),
            has_label=labels is not None,
            with_replacement=self.sampler == "replacement",
        )

    def learn(
        self, draw: ClassDraw, disagreement: Tensor, reduce: Callable[[Statistics], Statistics] | None = None
    ) -> None:
        """Lets the proposal learn from a step.

        Args:
            draw: the classes drawn.
            disagreement: s - p at every column, as :func:`hf_dis.losses.sampled_distillation_loss` returns it.
            reduce: sums the statistics over processes, see :func:`hf_dis.distributed.sum_over_processes`; not needed
                with one.
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


def usual_tails(num_shared_classes: int) -> int:
    """How many tails there are where it is not said: one where they are empty."""
    return 4 if num_shared_classes else 1


def make_sampler(
    num_classes: int,
    *,
    num_sampled_classes: int = 32,
    num_shared_classes: int = 512,
    num_tails: int | None = None,
    num_updated_classes: int | None = None,
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
        ValueError, TypeError: if an argument is out of its range; says which and what it may be.
    """
    require_number("num_classes", num_classes, int)
    require(num_classes >= 1, "num_classes", num_classes, "1 or more")
    if num_tails is None:
        num_tails = usual_tails(num_shared_classes)
    check_sampling_arguments(
        num_sampled_classes=num_sampled_classes,
        num_shared_classes=num_shared_classes,
        num_tails=num_tails,
        num_updated_classes=num_updated_classes,
        rank_depth=rank_depth,
        proposal=proposal,
        sampler=sampler,
        proposal_floor=proposal_floor,
        proposal_decay=proposal_decay,
    )
    # With all classes drawn for each row there is nothing left to share; a truncation has no tail.
    shared = 0 if proposal == "topk" or num_sampled_classes >= num_classes else min(num_shared_classes, num_classes)
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
    sizes = (num_classes, num_sampled_classes, shared, num_tails, depth)
    return ClassSampler(fitted, *sizes, sampler, num_updated_classes, seed)
