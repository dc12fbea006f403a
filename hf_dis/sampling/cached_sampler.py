"""The sampler for stored teacher targets.

A stored item has m ranked classes with their probabilities, and a stored sample of T classes for the rest. The
target of the loss lies on these classes alone. The student's normaliser needs the student alone. So every item
computes its stored classes with certainty, and further classes are sampled for the normaliser only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.checks import require
from hf_dis.kernels import uses_triton
from hf_dis.sampler_spec import SamplerSpec
from hf_dis.sampling.designs import ranks_to_classes, sample_ranks, systematic_points
from hf_dis.sampling.proposal import Proposal, TeacherProposal, make_proposal
from hf_dis.sampling.sample import ClassSample
from hf_dis.sampling.sampler import ClassSampler
from hf_dis.sampling.tails import ClassDensity, Tails, is_outside
from hf_dis.teacher.cached import UNKNOWN, CachedTargets
from hf_dis.teacher.compact import TargetLayout

if TYPE_CHECKING:
    from hf_dis.head.vocab_shard import VocabShard


class CachedSampler(ClassSampler):
    """Samples for stored targets: each item's stored classes, and more classes for the student's normaliser.

    - ``num_shared = 0``: all stored classes, and K classes per item, uniformly from those that are not ranked.
    - ``num_shared = K_t``: the ranked classes, K classes of the stored sample, and a tail of K_t classes that items
      share. The K classes differ from step to step; with K >= T they are the whole stored sample. The tail is sampled
      from the proposal over classes.

    A sampled class that the item has stored is not used a second time. The further classes have no part in the target,
    so that the proposal learns the student's probability there.

    Args:
        proposal: the density over classes of the shared tail.
        stored: the layout of the targets: C, m and T.
        num_sampled, num_shared, num_tails, design, num_updated, seed: as for :class:`ClassSampler`.
    """

    leaves_tails = False

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
        self._places = torch.arange(self.num_stored + self.num_sampled, device=proposal.device)

    @property
    def columns(self) -> int:
        """Student logits computed per item; the label's is not counted."""
        return self.num_stored + self.num_sampled + self.num_shared

    def _resize(self) -> None:
        super()._resize()
        self._places = torch.arange(self.num_stored + self.num_sampled, device=self._places.device)

    def _sample(self, teacher: Iterable[CachedTargets], tails: Tails, labels: Tensor | None) -> ClassSample:
        targets = CachedTargets.cat(list(teacher))
        if self.is_thinned:
            device = targets.ids.device
            targets = targets.thinned(systematic_points(len(targets), self.sample_size, self.generator, device))
        if self.num_shared and uses_triton(targets.ids.device):
            return self._assembled(targets, tails, labels)
        rest = self._sample_rest(targets)
        outside_top = is_outside(targets.ids, tails.ids)
        tail_log_weights, tail_certain = tails.columns(outside_top, labels)
        stored = _Columns(targets.ids, torch.zeros_like(targets.target), targets.used).without(~targets.used)
        own = [stored, rest]
        if labels is not None:
            label = labels[:, None]
            held = ((targets.ids == label) & targets.used).any(1, keepdim=True)
            column = _Columns(label, torch.zeros_like(label, dtype=torch.float32), ~held).without(held)
            own = [stored, rest.without(rest.ids == label), column]
        log_weights = torch.cat([*(part.log_weights for part in own), tail_log_weights], 1)
        num_ranked = self.num_stored + self.num_sampled
        unknown = log_weights.shape[1] - self.num_stored
        return ClassSample(
            item_ids=torch.cat([part.ids for part in own], 1),
            tail_ids=tails.ids,
            log_weights=log_weights,
            certain=torch.cat([*(part.certain for part in own), tail_certain], 1),
            log_probs=F.pad(targets.log_probs, (0, unknown), value=UNKNOWN),
            target=F.pad(targets.target, (0, unknown)),
            ranks=self._places.expand(len(targets), -1),
            rank_weights=log_weights[:, :num_ranked].exp(),
            outside_top=outside_top,
            class_mass=self._class_mass(targets),
            has_label=labels is not None,
            with_replacement=self.num_sampled > 0 and self.design == "replacement",
        )

    def _assembled(self, targets: CachedTargets, tails: Tails, labels: Tensor | None) -> ClassSample:
        """The same sample by a kernel, which makes all columns of an item at a time."""
        from hf_dis.sampling.triton_cached import assemble_stored

        given = targets.ids, targets.used, targets.target, targets.log_probs, *tails, labels
        names = ("item_ids", "log_weights", "certain", "log_probs", "target", "rank_weights", "outside_top")
        return ClassSample(
            tail_ids=tails.ids,
            ranks=self._places.expand(len(targets), -1),
            class_mass=self._class_mass(targets),
            has_label=labels is not None,
            with_replacement=False,
            **dict(zip(names, assemble_stored(*given, UNKNOWN), strict=True)),
        )

    def _class_mass(self, targets: CachedTargets) -> Tensor:
        wants_mass = self.num_shared and self.proposal.wants_class_mass
        if not wants_mass:
            return targets.target.new_empty(0)
        return targets.class_mass(is_sparse=self.proposal.shard is not None)

    def _sample_rest(self, targets: CachedTargets) -> _Columns:
        """K classes per item, sampled uniformly from those that are not ranked."""
        ranked, stored_tail = targets.ids.tensor_split([targets.depth], 1)
        if not self.num_sampled:
            none = ranked[:, :0]
            return _Columns(none, none.float(), none.bool())
        uniform = torch.ones(1, device=ranked.device)
        ranks, log_weights, certain = sample_ranks(
            uniform, self.num_ranks, len(targets), self.num_sampled, self.design, self.generator
        )
        ids = ranks_to_classes(targets.depth + ranks, ranked) if targets.depth else ranks
        return _Columns(ids, log_weights, certain).without(_is_among(stored_tail, ids))


class _Columns(NamedTuple):
    """Columns of a sample: class ids, log ω, and true where a class is certain; ``[n, K]`` each."""

    ids: Tensor
    log_weights: Tensor
    certain: Tensor

    def without(self, unused: Tensor) -> _Columns:
        """The columns with weights of zero where true, ``[n, K]``."""
        return self._replace(log_weights=self.log_weights.masked_fill(unused, -torch.inf))


class TailProposal(TeacherProposal):
    """DIS for the shared tail alone: the classes of an item are certain, so that no rank is sampled."""

    def class_density(self) -> ClassDensity:
        """Signal and teacher's marginal, mixed with the uniform share."""
        return self.memory.density(self.floor)


def make_cached_sampler(
    stored: TargetLayout,
    spec: SamplerSpec | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    shard: VocabShard | None = None,
) -> CachedSampler:
    """Makes a sampler for stored targets.

    Args:
        stored: the layout of the targets: C, m and T.
        spec: how classes are sampled; its proposal is the one of the shared tail.
        seed: of the sampler's own generator; give every process its own.
        device: of the targets.
        shard: as for :func:`hf_dis.make_sampler`.

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
        "another with a cache ('dis', 'teacher' or 'uniform'), whose stored classes are all computed anyway",
    )
    spec = spec.resolved(stored_sample_size=stored.sample_size)
    kind = {"dis": TailProposal, "teacher": TeacherProposal, "uniform": Proposal}[spec.proposal]
    proposal = make_proposal(kind, (stored.num_classes, stored.num_classes - stored.depth, 0), spec, device, shard)
    sizes = (spec.num_sampled_classes, spec.num_shared_classes, spec.num_tails)
    return CachedSampler(proposal, stored, *sizes, spec.design, spec.num_updated_classes, seed)


def _is_among(ascending: Tensor, ids: Tensor) -> Tensor:
    """True for ids ``[n, K]`` that are among those of their item in ascending order, ``[n, T]``: bool, ``[n, K]``."""
    if not ascending.shape[1]:
        return torch.zeros_like(ids, dtype=torch.bool)
    place = torch.searchsorted(ascending.contiguous(), ids).clamp_(max=ascending.shape[1] - 1)
    return ascending.gather(1, place) == ids
