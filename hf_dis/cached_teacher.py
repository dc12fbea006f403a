"""Distilling from stored targets: what the draw and the losses see of a teacher that is not there.

A stored row knows m ranked classes exactly and T classes that stand for its tail; of all others it knows nothing. The
target of the loss lies on the stored classes alone, and the student's normaliser needs the student alone: so every
row computes its stored classes, for certain, and further classes are drawn for the normaliser only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_sampling_arguments, require
from .compact import CompactTargets, TargetLayout
from .proposal import Proposal, TeacherProposal
from .sampler import ClassSampler, usual_tails
from .sampling import ClassDraw, Tails, draw_ranks, is_member, ranks_to_classes, systematic_points

# Stands for the log-probability of a class about which the row has nothing stored: none, as far as float32 can tell
# beside one. A processor takes the exponential of lower ones, which are denormal or zero, ten times as long.
UNKNOWN = -80.0


class CachedTargets:
    """Stored targets of some rows as columns of a draw.

    The target is unbiased over the sample that was stored. The log-probability of a stored tail class is not known:
    each carries their mean, by which the target's negative entropy is the one that was stored.

    Args:
        targets: as stored.
        num_classes: C.

    Attributes:
        ids: the stored classes, ranked ones first, then those of the tail, ``[n, m + T]``.
        used: false where a tail class repeats the one before it, ``[n, m + T]``.
        target: estimated teacher probabilities, each row sums to one, zero where not used, ``[n, m + T]``.
        log_probs: the ranked classes' log-probabilities, then the tail's mean, ``[n, m + T]``.
        depth: m.
        compact: as stored.
    """

    def __init__(self, targets: CompactTargets, num_classes: int):
        self.compact, self.num_classes, self.depth = targets, num_classes, targets.ids.shape[1]
        ranked = targets.log_probs.exp()
        tail, tail_mass = targets.tail_ids, targets.log_tail_mass[:, None].exp()
        first = torch.ones_like(tail, dtype=torch.bool)
        first[:, 1:] = tail[:, 1:] != tail[:, :-1]
        run = first.cumsum(1) - 1
        times = torch.zeros_like(tail_mass.expand(tail.shape)).scatter_add_(1, run, tail_mass.expand(tail.shape))
        tail_target = times.gather(1, run) / max(1, tail.shape[1]) * first
        target = torch.cat([ranked, tail_target], 1)
        log_probs = targets.log_probs.clamp_min(UNKNOWN)
        known = (ranked * log_probs).sum(1, keepdim=True)
        # No tail class is likelier than the last ranked one; where the tail is next to nothing, rounding may say so.
        highest = log_probs[:, -1:] if self.depth else torch.zeros_like(known)
        mean_log_prob = ((-targets.entropy[:, None] - known) / tail_mass).nan_to_num(UNKNOWN)
        mean_log_prob = torch.minimum(mean_log_prob.clamp_min(UNKNOWN), highest)
        self.ids = torch.cat([targets.ids, tail], 1)
        self.used = torch.cat([torch.ones_like(ranked, dtype=torch.bool), first], 1)
        self.target = target / target.sum(1, keepdim=True)
        self.log_probs = torch.cat([log_probs, mean_log_prob.expand(tail.shape)], 1)

    def __len__(self) -> int:
        return len(self.ids)

    def thinned(self, tail_draws: int, generator: torch.Generator) -> CachedTargets:
        """As if only so many draws of the tail had been stored: of each row some of those that were, at random.

        Each draw is kept with the same probability, and they are spread evenly over the tail, so the target stays
        unbiased.
        """
        stored = self.compact.tail_ids
        every = stored.shape[1] / tail_draws
        kept = (systematic_points(len(self), tail_draws, generator) * every).long().clamp_(max=stored.shape[1] - 1)
        return CachedTargets(
            self.compact._replace(tail_ids=stored.gather(1, kept.to(stored.device))), self.num_classes
        )

    def class_mass(self) -> Tensor:
        """An unbiased estimate of :meth:`hf_dis.targets.TeacherTargets.class_mass`, ``[C]``."""
        tail = self.target[:, self.depth :]
        return tail.new_zeros(self.num_classes).index_add_(0, self.ids[:, self.depth :].flatten(), tail.flatten())


class CachedSampler(ClassSampler):
    """Draws for stored targets: each row's stored classes, and others for the student's normaliser.

    - ``num_shared = 0``: all that is stored, and K classes for each row, uniformly from those that are not ranked.
    - ``num_shared = K_t``: the ranked classes and K draws of the stored tail, in each step others, all of them if
      there are not more; and a tail of K_t classes that rows share, drawn from the proposal over classes.

    Either leaves out what it has of a row already. At these classes only the student is wanted, and what the proposal
    learns there is the student's probability alone: the target has no part in them.

    Args:
        proposal: whose density over classes the shared tail is drawn from.
        stored: how the targets are laid out, which says C, m and T.
        num_sampled, num_shared, num_tails, sampler, num_updated, seed: as for :class:`ClassSampler`.
    """

    def __init__(
        self,
        proposal: Proposal,
        stored: TargetLayout,
        num_sampled: int,
        num_shared: int,
        num_tails: int,
        sampler: str = "pps",
        num_updated: int | None = None,
        seed: int = 0,
    ):
        sizes = (stored.num_classes, num_sampled, num_shared, num_tails, stored.depth)
        super().__init__(proposal, *sizes, sampler, num_updated, seed)
        self.tail_draws = min(num_sampled, stored.tail_draws) if self.num_shared else stored.tail_draws
        self.is_thinned = self.tail_draws < stored.tail_draws
        self.num_stored = stored.depth + self.tail_draws
        self.num_ranks = stored.num_classes - stored.depth
        self.num_sampled = 0 if self.num_shared else min(num_sampled, self.num_ranks)

    @property
    def columns(self) -> int:
        return self.num_stored + self.num_sampled + self.num_shared

    def _draw_chunk(self, targets: CachedTargets, tails: Tails, first_row: int, labels: Tensor | None) -> ClassDraw:
        if self.is_thinned:
            targets = targets.thinned(self.tail_draws, self.generator)
        num_rows, device = len(targets), targets.ids.device
        rest_ids, rest_weights, rest_certain = self._draw_rest(targets)
        shared_ids, shared_weights, shared_certain = tails.of_rows(first_row, num_rows)
        outside_head = ~is_member(targets.ids, tails.ids, first_row)
        log_weights = [
            torch.zeros_like(targets.target).masked_fill_(~targets.used, -torch.inf),
            rest_weights,
            shared_weights.masked_fill(~outside_head, -torch.inf),
        ]
        certain = [targets.used, rest_certain, shared_certain]
        ids = [targets.ids, rest_ids]
        if labels is not None:
            label = labels[:, None]
            held = ((targets.ids == label) & targets.used).any(1, keepdim=True)
            log_weights[1:] = [
                log_weights[1].masked_fill(rest_ids == label, -torch.inf),
                torch.zeros_like(label, dtype=torch.float32).masked_fill_(held, -torch.inf),
                log_weights[2].masked_fill(shared_ids == label, -torch.inf),
            ]
            certain.insert(2, ~held)
            ids.append(label)
        log_weights = torch.cat(log_weights, 1)
        unknown = log_weights.shape[1] - self.num_stored
        wants_mass = self.num_shared and self.proposal.wants_class_mass
        return ClassDraw(
            row_ids=torch.cat(ids, 1),
            shared_ids=tails.ids,
            log_weights=log_weights,
            certain=torch.cat(certain, 1),
            log_probs=F.pad(targets.log_probs, (0, unknown), value=UNKNOWN),
            target=F.pad(targets.target, (0, unknown)),
            ranks=torch.arange(self.num_stored + self.num_sampled, device=device).expand(num_rows, -1),
            rank_weights=log_weights[:, : self.num_stored + self.num_sampled].exp(),
            outside_head=outside_head,
            class_mass=targets.class_mass() if wants_mass else targets.target.new_empty(0),
            has_label=labels is not None,
            with_replacement=self.num_sampled > 0 and self.sampler == "replacement",
        )

    def _draw_rest(self, targets: CachedTargets) -> tuple[Tensor, Tensor, Tensor]:
        """Class ids, log ω and whether the class is certain, of K uniformly drawn for each row from those that are not
        ranked: ``[n, K]`` each."""
        ranked, stored_tail = targets.ids.tensor_split([targets.depth], 1)
        if not self.num_sampled:
            none = ranked[:, :0]
            return none, none.float(), none.bool()
        uniform = torch.ones(1, device=ranked.device)
        ranks, log_weights, certain = draw_ranks(
            uniform, self.num_ranks, len(targets), self.num_sampled, self.sampler, self.generator
        )
        ids = ranks_to_classes(targets.depth + ranks, ranked) if targets.depth else ranks
        return ids, log_weights.masked_fill(_in_order(stored_tail, ids), -torch.inf), certain


class TailProposal(TeacherProposal):
    """What DIS learns where the ranks are certain: a :class:`hf_dis.proposal.ClassMemory` for the shared tail."""

    def class_density(self) -> Tensor:
        return self.memory.density(self.floor)


def make_cached_sampler(
    stored: TargetLayout,
    *,
    num_sampled_classes: int = 512,
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
) -> CachedSampler:
    """A sampler for stored targets.

    Args:
        stored: how they are laid out, which says C, m and T.
        proposal: of the shared tail, ``"dis"``, ``"teacher"`` or ``"uniform"``.
        num_sampled_classes, num_shared_classes, num_tails: K, K_t and G, see :class:`CachedSampler`.
        num_updated_classes, rank_depth, sampler, proposal_floor, proposal_decay, seed, device: as for
            :func:`hf_dis.make_sampler`.

    Raises:
        ValueError: if an argument is out of its range, or asks for what is not stored.
    """
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
    depths = None, stored.depth
    require(rank_depth in depths, "rank_depth", rank_depth, f"None or {stored.depth}, the ranks that the cache holds")
    require(
        proposal != "topk", "proposal", proposal, "another with a cache, whose stored classes are all computed anyway"
    )
    layout = (stored.num_classes, stored.num_classes - stored.depth, 0)
    if proposal == "uniform":
        fitted = Proposal(*layout, device=device)
    else:
        kind = TailProposal if proposal == "dis" else TeacherProposal
        fitted = kind(*layout, floor=proposal_floor, decay=proposal_decay, device=device)
    sizes = (num_sampled_classes, num_shared_classes, num_tails)
    return CachedSampler(fitted, stored, *sizes, sampler, num_updated_classes, seed)


def _in_order(ascending: Tensor, ids: Tensor) -> Tensor:
    """Which of the ids, ``[n, K]``, are among those of their row in ascending order, ``[n, T]``: bool, ``[n, K]``."""
    if not ascending.shape[1]:
        return torch.zeros_like(ids, dtype=torch.bool)
    place = torch.searchsorted(ascending.contiguous(), ids).clamp_(max=ascending.shape[1] - 1)
    return ascending.gather(1, place) == ids
