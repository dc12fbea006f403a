"""Distilling from stored targets: what the sample and the losses see of a teacher that is not there.

A stored item knows m ranked classes exactly and T classes that stand for its tail; of all others it knows nothing. The
target of the loss lies on the stored classes alone, and the student's normaliser needs the student alone: so every
item computes its stored classes, for certain, and further classes are sampled for the normaliser only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.arguments import SamplerSpec
from hf_dis.checks import require
from hf_dis.sampling.designs import ranks_to_classes, sample_ranks, systematic_points
from hf_dis.sampling.proposal import Proposal, TeacherProposal
from hf_dis.sampling.sample import ClassSample
from hf_dis.sampling.sampler import ClassSampler, make_proposal
from hf_dis.sampling.tails import Tails, is_member
from hf_dis.teacher.cached import UNKNOWN, CachedTargets
from hf_dis.teacher.compact import TargetLayout


class CachedSampler(ClassSampler):
    """Samples for stored targets: each item's stored classes, and others for the student's normaliser.

    - ``num_shared = 0``: all that is stored, and K classes for each item, uniformly from those that are not ranked.
    - ``num_shared = K_t``: the ranked classes and K samples of the stored tail, in each step others, all of them if
      there are not more; and a tail of K_t classes that items share, sampled from the proposal over classes.

    Either leaves out what it has of an item already. At these classes only the student is wanted, and what the proposal
    learns there is the student's probability alone: the target has no part in them.

    Args:
        proposal: whose density over classes the shared tail is sampled from.
        stored: how the targets are laid out, which says C, m and T.
        num_sampled, num_shared, num_tails, design, num_updated, seed: as for :class:`ClassSampler`.
    """

    def __init__(
        self,
        proposal: Proposal,
        stored: TargetLayout,
        num_sampled: int,
        num_shared: int,
        num_tails: int,
        design: str = "pps",
        num_updated: int | None = None,
        seed: int = 0,
    ):
        sizes = (stored.num_classes, num_sampled, num_shared, num_tails, stored.depth)
        super().__init__(proposal, *sizes, design, num_updated, seed)
        self.sample_size = min(num_sampled, stored.sample_size) if self.num_shared else stored.sample_size
        self.is_thinned = self.sample_size < stored.sample_size
        self.num_stored = stored.depth + self.sample_size
        self.num_ranks = stored.num_classes - stored.depth
        self.num_sampled = 0 if self.num_shared else min(num_sampled, self.num_ranks)

    @property
    def columns(self) -> int:
        return self.num_stored + self.num_sampled + self.num_shared

    def _sample_chunk(
        self, targets: CachedTargets, tails: Tails, first_item: int, labels: Tensor | None
    ) -> ClassSample:
        if self.is_thinned:
            points = systematic_points(len(targets), self.sample_size, self.generator)
            targets = targets.thinned(points.to(targets.ids.device, non_blocking=True))
        num_items, device = len(targets), targets.ids.device
        rest_ids, rest_weights, rest_certain = self._sample_rest(targets)
        tail_ids, shared_weights, shared_certain = tails.of_items(first_item, num_items)
        outside_top = ~is_member(targets.ids, tails.ids, first_item)
        log_weights = [
            torch.zeros_like(targets.target).masked_fill_(~targets.used, -torch.inf),
            rest_weights,
            shared_weights.masked_fill(~outside_top, -torch.inf),
        ]
        certain = [targets.used, rest_certain, shared_certain]
        ids = [targets.ids, rest_ids]
        if labels is not None:
            label = labels[:, None]
            held = ((targets.ids == label) & targets.used).any(1, keepdim=True)
            log_weights[1:] = [
                log_weights[1].masked_fill(rest_ids == label, -torch.inf),
                torch.zeros_like(label, dtype=torch.float32).masked_fill_(held, -torch.inf),
                log_weights[2].masked_fill(tail_ids == label, -torch.inf),
            ]
            certain.insert(2, ~held)
            ids.append(label)
        log_weights = torch.cat(log_weights, 1)
        unknown = log_weights.shape[1] - self.num_stored
        wants_mass = self.num_shared and self.proposal.wants_class_mass
        return ClassSample(
            item_ids=torch.cat(ids, 1),
            tail_ids=tails.ids,
            log_weights=log_weights,
            certain=torch.cat(certain, 1),
            log_probs=F.pad(targets.log_probs, (0, unknown), value=UNKNOWN),
            target=F.pad(targets.target, (0, unknown)),
            ranks=torch.arange(self.num_stored + self.num_sampled, device=device).expand(num_items, -1),
            rank_weights=log_weights[:, : self.num_stored + self.num_sampled].exp(),
            outside_top=outside_top,
            class_mass=targets.class_mass() if wants_mass else targets.target.new_empty(0),
            has_label=labels is not None,
            with_replacement=self.num_sampled > 0 and self.design == "replacement",
        )

    def _sample_rest(self, targets: CachedTargets) -> tuple[Tensor, Tensor, Tensor]:
        """Class ids, log ω and whether the class is certain, of K uniformly sampled for each item from those that are not
        ranked: ``[n, K]`` each."""
        ranked, stored_tail = targets.ids.tensor_split([targets.depth], 1)
        if not self.num_sampled:
            none = ranked[:, :0]
            return none, none.float(), none.bool()
        uniform = torch.ones(1, device=ranked.device)
        ranks, log_weights, certain = sample_ranks(
            uniform, self.num_ranks, len(targets), self.num_sampled, self.design, self.generator
        )
        ids = ranks_to_classes(targets.depth + ranks, ranked) if targets.depth else ranks
        return ids, log_weights.masked_fill(_in_order(stored_tail, ids), -torch.inf), certain


class TailProposal(TeacherProposal):
    """What DIS learns where the ranks are certain: a :class:`hf_dis.sampling.class_memory.ClassMemory` for the shared tail."""

    def class_density(self) -> Tensor:
        return self.memory.density(self.floor)


def make_cached_sampler(
    stored: TargetLayout, spec: SamplerSpec | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> CachedSampler:
    """Makes a sampler for stored targets.

    Args:
        stored: layout of the targets: C, m and T.
        spec: how classes are sampled; its proposal is that of the shared tail.
        seed: of the sampler's own generator; give every process its own.
        device: of the targets.

    Raises:
        ValueError: if ``spec`` asks for ranks that are not stored, or for a truncation.
    """
    spec = spec or SamplerSpec()
    require(
        spec.rank_depth in (None, stored.depth),
        "rank_depth",
        spec.rank_depth,
        f"None or {stored.depth}, the ranks that the cache holds",
    )
    require(
        spec.proposal != "topk",
        "proposal",
        spec.proposal,
        "'dis', 'teacher' or 'uniform' with a cache, whose stored classes are all computed anyway",
    )
    spec = spec.resolved(stored_sample_size=stored.sample_size)
    kind = {"dis": TailProposal, "teacher": TeacherProposal, "uniform": Proposal}[spec.proposal]
    proposal = make_proposal(kind, (stored.num_classes, stored.num_classes - stored.depth, 0), spec, device)
    sizes = (spec.num_sampled_classes, spec.num_shared_classes, spec.num_tails)
    return CachedSampler(proposal, stored, *sizes, spec.design, spec.num_updated_classes, seed)


def _in_order(ascending: Tensor, ids: Tensor) -> Tensor:
    """Which of the ids, ``[n, K]``, are among those of their item in ascending order, ``[n, T]``: bool, ``[n, K]``."""
    if not ascending.shape[1]:
        return torch.zeros_like(ids, dtype=torch.bool)
    place = torch.searchsorted(ascending.contiguous(), ids).clamp_(max=ascending.shape[1] - 1)
    return ascending.gather(1, place) == ids
