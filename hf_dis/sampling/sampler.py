"""ClassSampler: a proposal and a layout, sampling the classes of a step and learning from what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from hf_dis.arguments import SamplerSpec
from hf_dis.checks import require, require_number
from hf_dis.sampling.designs import Updates, ranks_to_classes, sample_ranks
from hf_dis.sampling.proposal import DISProposal, Proposal, TeacherProposal, TopKProposal
from hf_dis.sampling.sample import ClassSample, Statistics, Stratum
from hf_dis.sampling.tails import Tails, is_member, sample_tails
from hf_dis.teacher.targets import TeacherTargets


class ClassSampler:
    """Samples the classes of a step from a proposal, in one of two layouts.

    - ``num_shared = 0``: K classes for each item over all C ranks, the setting of arXiv 1812.00914.
    - ``num_shared = K_t``: K of each item's m best-ranked classes, and a tail of K_t classes that items share.

    Args:
        proposal: where to sample, see :mod:`hf_dis.proposal`.
        num_classes: C.
        num_sampled: K, classes sampled for each item.
        num_shared: K_t, classes of a tail; 0 for the per-item layout.
        num_tails: G, tails of a step: item i uses tail ``i mod G``.
        rank_depth: m, the depth to which the teacher's ranking is resolved.
        design: ``"pps"`` or ``"replacement"``; the latter only with ``num_shared = 0``.
        num_updated: U: at most U N of the distinct sampled classes update the head; all of them if None.
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
        design: str = "pps",
        num_updated: int | None = None,
        seed: int = 0,
    ):
        self.proposal = proposal
        self.rank_depth = min(rank_depth, num_classes)
        self.num_shared = min(num_shared, num_classes) if self.rank_depth < num_classes else 0
        self.num_tails = num_tails if self.num_shared else 1
        self.num_ranks = self.rank_depth if self.num_shared else num_classes
        self.num_sampled = min(num_sampled, self.num_ranks)
        self.design, self.num_updated = design, num_updated
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def columns(self) -> int:
        """Student logits computed for each item, the label's aside: K + K_t."""
        return self.num_sampled + self.num_shared

    def sample(self, teacher: Iterable[TeacherTargets], labels: Tensor | None = None) -> ClassSample:
        """Samples for all items of a step.

        Args:
            teacher: the items' ranked targets, chunk by chunk; each chunk is dropped before the next is made.
            labels: class ids ``[N]``, always in the sample if given.
        """
        if self.num_shared:
            tails = sample_tails(self.proposal.class_density(), self.num_shared, self.num_tails, self.generator)
        else:
            none = torch.empty(1, 0, dtype=torch.long, device=self.proposal.device)
            tails = Tails(none, none.double())
        samples, first_item = [], 0
        for targets in teacher:
            items = slice(first_item, first_item + len(targets))
            samples.append(self._sample_chunk(targets, tails, first_item, None if labels is None else labels[items]))
            first_item = items.stop
            del targets  # the next chunk is computed without this one in memory
        sample = ClassSample.cat(samples)
        if self.num_updated is None:
            return sample
        start = torch.rand((), dtype=torch.float64, generator=self.generator)
        return replace(sample, updates=Updates(self.num_updated * len(sample), float(start)))

    def _sample_chunk(
        self, targets: TeacherTargets, tails: Tails, first_item: int, labels: Tensor | None
    ) -> ClassSample:
        num_items = len(targets)
        ranks, log_weights, certain = sample_ranks(
            self.proposal.rank_density(targets),
            self.num_ranks,
            num_items,
            self.num_sampled,
            self.design,
            self.generator,
        )
        ids = ranks_to_classes(ranks, targets.ids)
        top_mass = targets.log_probs.exp().sum(1)
        if not self.num_shared:
            top_mass = torch.ones_like(top_mass)
        ranked = Stratum(ids, log_weights, certain, targets.log_prob(ids), top_mass)

        tail_ids, shared_weights, shared_certain = tails.of_items(first_item, num_items)
        outside_top = ~is_member(targets.ids, tails.ids, first_item)
        shared = Stratum(
            ids=tail_ids,
            log_weights=shared_weights.masked_fill(~outside_top, -torch.inf),
            certain=shared_certain,
            log_probs=targets.log_prob(tail_ids),
            mass=1 - top_mass,
        )
        strata = [ranked, shared]
        if labels is not None:
            label = labels[:, None]
            log_prob = targets.log_prob(label)
            zero = torch.zeros_like(label, dtype=torch.float32)
            own = Stratum(label, zero, torch.ones_like(label, dtype=torch.bool), log_prob, log_prob[:, 0].exp())
            in_top = (targets.ids == label).any(1) | (not self.num_shared)
            strata = [ranked.without(own, in_top), own, shared.without(own, ~in_top)]

        target = torch.cat([stratum.target() for stratum in strata], 1)
        wants_mass = self.num_shared and self.proposal.wants_class_mass
        return ClassSample(
            item_ids=torch.cat([stratum.ids for stratum in strata[:-1]], 1),
            tail_ids=tails.ids,
            log_weights=torch.cat([stratum.log_weights for stratum in strata], 1),
            certain=torch.cat([stratum.certain for stratum in strata], 1),
            log_probs=torch.cat([stratum.log_probs for stratum in strata], 1),
            # All zero where only classes that the teacher gives nothing were sampled: the item then says nothing.
            target=target / target.sum(1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny),
            ranks=ranks,
            rank_weights=log_weights.exp(),
            outside_top=outside_top,
            class_mass=targets.class_mass() if wants_mass else target.new_empty(0),
            has_label=labels is not None,
            with_replacement=self.design == "replacement",
        )

    def learn(
        self, sample: ClassSample, signal: Tensor, reduce: Callable[[Statistics], Statistics] | None = None
    ) -> None:
        """Lets the proposal learn from a step.

        Args:
            sample: the classes sampled.
            signal: s - p at every column, as :func:`hf_dis.loss.divergence.sampled_distillation_loss` returns it.
            reduce: sums the statistics over processes, see :func:`hf_dis.distributed.sums.sum_over_processes`; not needed
                with one.
        """
        with torch.no_grad():
            statistics = self.proposal.statistics(sample, signal)
            if statistics:
                self.proposal.update(reduce(statistics) if reduce else statistics)

    def state_dict(self) -> dict[str, Tensor]:
        """The proposal's state and the generator's."""
        return {**self.proposal.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave: the next sample is the one that would have come next."""
        self.generator.set_state(state["generator"])
        self.proposal.load_state_dict(state)


def make_sampler(
    num_classes: int, spec: SamplerSpec | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> ClassSampler:
    """Makes a sampler for C classes of a teacher that knows every class.

    Args:
        num_classes: C >= 1.
        spec: how classes are sampled; sizes that are None take the defaults of a classifier.
        seed: of the sampler's own generator; give every process its own.
        device: of the teacher's targets.

    Raises:
        TypeError, ValueError: if C or ``spec`` is out of range, or the two do not fit.
    """
    require_number("num_classes", num_classes, int)
    require(num_classes >= 1, "num_classes", num_classes, "1 or more")
    spec = (spec or SamplerSpec()).resolved()
    # With all classes sampled for each item there is nothing left to share; a truncation has no tail.
    all_sampled = spec.num_sampled_classes >= num_classes
    num_shared = 0 if spec.proposal == "topk" or all_sampled else min(spec.num_shared_classes, num_classes)
    depth = min(spec.rank_depth, num_classes)
    if (num_shared or spec.proposal == "topk") and depth < min(spec.num_sampled_classes, num_classes):
        raise ValueError(
            f"rank_depth is {spec.rank_depth}, and num_sampled_classes is {spec.num_sampled_classes}: the classes of "
            "an item are sampled from its best-ranked ones; set rank_depth to num_sampled_classes or more"
        )
    ranks = (num_classes, depth if num_shared and depth < num_classes else num_classes, depth)
    if spec.proposal == "topk":
        proposal = TopKProposal(*ranks, num_sampled=spec.num_sampled_classes, device=device)
    else:
        kind = {"dis": DISProposal, "teacher": TeacherProposal, "uniform": Proposal}[spec.proposal]
        proposal = make_proposal(kind, ranks, spec, device)
    sizes = (num_classes, spec.num_sampled_classes, num_shared, spec.num_tails, depth)
    return ClassSampler(proposal, *sizes, spec.design, spec.num_updated_classes, seed)


def make_proposal(
    kind: type[Proposal], ranks: tuple[int, int, int], spec: SamplerSpec, device: torch.device | str
) -> Proposal:
    """Makes a proposal of a kind; a proposal that learns takes floor and decay from the specification.

    Args:
        kind: the class of the proposal.
        ranks: C, the ranks that items sample from, the ranks resolved one by one.
        spec: how classes are sampled.
        device: of the teacher's targets.
    """
    if kind is Proposal:
        return Proposal(*ranks, device=device)
    return kind(*ranks, floor=spec.proposal_floor, decay=spec.proposal_decay, device=device)
