"""ClassSampler: samples the classes of a step from a proposal, and lets the proposal learn from the step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_dis.checks import require, require_number
from hf_dis.kernels import uses_triton
from hf_dis.precision import check_sparse, widest
from hf_dis.sampler_spec import SamplerSpec
from hf_dis.sampling.all_ranks import AllRanks, sample_all_ranks
from hf_dis.sampling.answers import Answers, Chosen, Logits, Ranked
from hf_dis.sampling.budget import Budget, Variances
from hf_dis.sampling.by_kernels import RankPoints, SampleWithoutTails, Sampling
from hf_dis.sampling.class_memory import sent_mass
from hf_dis.sampling.designs import Updates, ranks_to_classes, sample_ranks, systematic_starts
from hf_dis.sampling.proposal import DISProposal, Proposal, TeacherProposal, TopKProposal, make_proposal
from hf_dis.sampling.sample import ClassSample, Statistics, Stratum, item_counts, label_stratum, normalised
from hf_dis.sampling.sharded_tails import ShardedTails
from hf_dis.sampling.tails import Tails, is_outside, no_class
from hf_dis.teacher.targets import TeacherTargets

if TYPE_CHECKING:
    from hf_dis.head.vocab_shard import VocabShard
    from hf_dis.report.gradient_error import GradientError


class ClassSampler:
    """Samples the classes of a step from a proposal, in one of two layouts.

    - ``num_shared = 0``: K classes per item from all C ranks, the setting of arXiv 1812.00914.
    - ``num_shared = K_t``: K of each item's m best-ranked classes, and a tail of K_t classes that items share.

    Args:
        proposal: the densities to sample from, see :mod:`hf_dis.sampling.proposal`.
        num_classes: C.
        num_sampled: K, the number of classes sampled per item.
        num_shared: K_t, the number of classes of a tail; 0 for the per-item layout.
        num_tails: G, tails per step: item i uses tail ``i mod G``.
        rank_depth: m, the depth to which the teacher's ranking is resolved.
        design: ``"pps"`` or ``"replacement"``; the latter with ``num_shared = 0`` only.
        num_updated: U: at most U·N of the distinct sampled classes update the head; all of them if None.
        seed: of the sampler's own generator; give every process its own.

    Raises:
        ValueError: if a shared tail needs sparse tensors, and torch has none for the device.

    Attributes:
        budget: chooses K and K_t of the next batch by the error of the gradient; None: they are fixed.
        not_finite: the number of items so far from which the proposal did not learn, their signal being NaN or Inf.
        leaves_tails: the samplers of the class have :meth:`sample_without_tails`.
    """

    leaves_tails = True

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
        self._certain_ranks = AllRanks.of(self.rank_depth, proposal.device)
        self._shared = ShardedTails(proposal.shard, num_classes)
        self.design, self.num_updated = design, num_updated
        if self.num_shared and proposal.wants_class_mass:
            wanted = f"num_shared_classes is {num_shared} with a proposal that learns about classes"
            check_sparse(proposal.device, wanted, "set num_shared_classes=0, or proposal='uniform'")
        self.generator = torch.Generator().manual_seed(seed)
        self.budget: Budget | None = None
        self.not_finite = torch.zeros((), dtype=torch.long, device=proposal.device)

    @property
    def columns(self) -> int:
        """Student logits computed per item, K + K_t; the label's is not counted."""
        return self.num_sampled + self.num_shared

    def sample(self, teacher: Iterable[TeacherTargets], labels: Tensor | None = None) -> ClassSample:
        """Samples for all items of a step.

        Args:
            teacher: the items' ranked targets, chunk by chunk, at least one chunk. A chunk is released before the
                next is made.
            labels: class ids ``[N]``; always in the sample if given.
        """
        sample = self._sample(teacher, self._tails(), labels)
        return replace(sample, updates=self._updates(len(sample)))

    def sample_without_tails(self, teacher: Iterable[TeacherTargets], labels: Tensor | None) -> SampleWithoutTails:
        """As :meth:`sample`, by kernels; the columns of the tails are left to the kernel that needs them."""
        tails = self._tails()
        if self.num_shared:
            answers, class_mass = self._answers(teacher, tails, labels)
            sample = self._sampling(answers, tails, labels, class_mass).without_tails()
        else:
            sample = SampleWithoutTails.of(self._sample(teacher, tails, labels))
        return replace(sample, updates=self._updates(len(sample)))

    def _tails(self) -> Tails:
        if not self.num_shared:
            return no_class(self.proposal.device)
        return self._shared.sample(self.proposal.class_density(), self.num_shared, self.num_tails, self.generator)

    def _updates(self, num_items: int) -> Updates | None:
        if self.num_updated is None:
            return None
        start = torch.rand((), dtype=torch.float64, generator=self.generator)
        return Updates(self.num_updated * num_items, float(start))

    def _sample(self, teacher: Iterable[TeacherTargets], tails: Tails, labels: Tensor | None) -> ClassSample:
        answers, class_mass = self._answers(teacher, tails, labels)
        if self.num_shared and uses_triton(answers.ids.device):
            return self._sampling(answers, tails, labels, class_mass).assembled()
        if self._samples_all_ranks:
            return sample_all_ranks(answers, tails, labels, class_mass, self._certain_ranks)
        ranked, outside_top = answers.ranked or self._sample_ranked(answers), is_outside(answers.ids, tails.ids)
        strata = [ranked.stratum]
        if labels is None:
            mass = 1 - strata[0].mass
        else:
            own = label_stratum(labels, answers.label_log_probs)
            # All classes are ranked where no tail is shared.
            in_top = (answers.ids == own.ids).any(1) if self.num_shared else torch.ones_like(labels, dtype=torch.bool)
            strata = [ranked.stratum.without(own, in_top), own]
            mass = 1 - strata[0].mass - own.mass
        shared = Stratum(tails.ids, *tails.columns(outside_top, labels), answers.tail_log_probs, mass)
        # The label is the only class of its stratum, and certain: its target is the mass.
        target = torch.cat([strata[0].target(), *(one.mass[:, None] for one in strata[1:]), shared.target()], 1)
        columns = [*strata, shared]
        return ClassSample(
            item_ids=torch.cat([stratum.ids for stratum in strata], 1),
            tail_ids=tails.ids,
            log_weights=torch.cat([stratum.log_weights for stratum in columns], 1),
            certain=torch.cat([stratum.certain for stratum in columns], 1),
            log_probs=torch.cat([stratum.log_probs for stratum in columns], 1),
            target=normalised(target),
            ranks=ranked.ranks,
            rank_weights=ranked.stratum.log_weights.exp(),
            outside_top=outside_top,
            class_mass=class_mass,
            has_label=labels is not None,
            with_replacement=self.design == "replacement",
        )

    @property
    def _samples_all_ranks(self) -> bool:
        """Each item samples all its m ranks, in their order."""
        return self.num_shared > 0 and self.design == "pps" and self.num_sampled == self.num_ranks

    def _sampling(self, answers: Answers, tails: Tails, labels: Tensor | None, class_mass: Tensor) -> Sampling:
        """The classes of which kernels make the columns."""
        points = RankPoints()
        if not self._samples_all_ranks:  # else the generator is left as without kernels
            density = self.proposal.rank_density(answers)
            starts = systematic_starts(len(answers.ids), self.num_sampled, self.generator, density.device)
            points = RankPoints.of(density, self.num_sampled, starts)
        return Sampling(answers, tails, points, labels, class_mass, self.num_sampled)

    def _answers(
        self, teacher: Iterable[TeacherTargets], tails: Tails, labels: Tensor | None
    ) -> tuple[Answers, Tensor]:
        """The teacher's targets, and the class mass as :class:`ClassSample` has it."""
        wants_mass = self.num_shared and self.proposal.wants_class_mass
        chosen, parts, mass, first_item = None, [], None, 0
        for targets in teacher:
            temperature = targets.temperature
            # Where all C ranks are sampled from, only the chunk can tell their classes.
            ranked = None if self.num_shared else self._sample_all_ranks(targets)
            by_kernels = uses_triton(tails.ids.device)
            if wants_mass and not by_kernels:  # the normaliser comes with the mass
                mass = targets.class_mass(mass)
            chosen = chosen or Chosen.of(tails.ids, labels, len(targets))
            parts.append(Logits.of(targets, chosen, first_item, ranked))
            if wants_mass and by_kernels:  # the normaliser comes with the answers
                mass = targets.class_mass(mass)
            first_item += len(targets)
            del targets  # the next chunk is computed without this one in memory
        answers = Answers.of(parts, self.num_shared, temperature)
        return answers, answers.log_probs.new_empty(0) if mass is None else answers.unranked_mass(mass, parts)

    def _sample_ranked(self, answers: Answers) -> Ranked:
        """K of each item's m ranks."""
        mass = answers.log_probs.exp().sum(1)
        ranks, log_weights, certain = self._sample_ranks(answers)
        # Above the resolved depth a rank is a place in the ranking.
        ids, log_probs = (values.gather(1, ranks) for values in (answers.ids, answers.log_probs))
        return Ranked(ranks, Stratum(ids, log_weights, certain, log_probs, mass))

    def _sample_all_ranks(self, targets: TeacherTargets) -> Ranked:
        """K of all C ranks, for each item of a chunk."""
        ranks, log_weights, certain = self._sample_ranks(targets)
        ids = ranks_to_classes(ranks, targets.ids)
        mass = torch.ones_like(targets.log_normaliser[:, 0])
        return Ranked(ranks, Stratum(ids, log_weights, certain, targets.log_prob(ids), mass))

    def _sample_ranks(self, answers: Answers | TeacherTargets) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks, log-weights and certain, as :func:`sample_ranks`."""
        density, num_items = self.proposal.rank_density(answers), len(answers.ids)
        return sample_ranks(density, self.num_ranks, num_items, self.num_sampled, self.design, self.generator)

    def learn(
        self,
        sample: ClassSample,
        signal: Tensor,
        reduce: Callable[[Statistics], Statistics] | None = None,
        finite: Tensor | None = None,
    ) -> None:
        """Lets the proposal learn from a step; items whose signal is NaN or Inf are left out and counted.

        Args:
            sample: the classes.
            signal: the gradient of the exact loss at every column, up to a factor, ``[N, R + K_t]``, as
                :meth:`hf_dis.loss.divergence.Divergence.sampled` returns it; s - p for the forward KL.
            reduce: sums the statistics over processes, see :func:`hf_dis.distributed.sums.sum_over_processes`; not
                needed with one process.
            finite: the items with a finite signal, ``[N]``, as :meth:`ClassSample.finite_items` finds them; None: they
                are found here.
        """
        with torch.no_grad():
            if finite is None and not _is_known_to_be_finite(signal):
                finite = sample.finite_items(signal)
            statistics = self.proposal.statistics(replace(sample, finite=finite), signal)
            if not statistics:
                return
            statistics |= item_counts(len(signal), finite)
            if reduce is not None:
                if (mass := statistics.get("class_mass")) is not None:
                    statistics["class_mass"] = sent_mass(mass, self.generator, self.proposal.shard is not None)
                statistics = reduce(statistics)
            self.proposal.update(statistics)
            self.not_finite += statistics["not_finite"]

    def follow(self, error: GradientError, reduce: Callable[[Statistics], Statistics] | None = None) -> None:
        """Gives the budget an estimated error of the gradient, and takes its sizes for the next batch.

        Args:
            error: of some items.
            reduce: as for :meth:`learn`; all processes take the same sizes.
        """
        sums = {"errors": torch.stack([part.to(widest(part.device)).sum() for part in error])}
        sums = sums if reduce is None else reduce(sums)
        self.budget.observe(Variances(*sums["errors"].tolist()))
        self._resize()

    def _resize(self) -> None:
        self.num_sampled, self.num_shared = self.budget.sizes
        self.num_updated = self.budget.num_updated

    def scalars(self) -> dict[str, float]:
        """Numbers to log, read from the device: the proposal's, and ``dis/not_finite`` if any item was left out.

        Warns once if any item was left out.
        """
        scalars, not_finite = self.proposal.scalars(), int(self.not_finite)
        if self.budget is not None:
            scalars |= {"dis/num_sampled_classes": self.num_sampled, "dis/num_shared_classes": self.num_shared}
        if not_finite:
            warnings.warn(  # Python shows it once
                "logits of student or teacher had NaN or Inf: dis/not_finite is the number of these items, from which "
                "the proposal learns nothing. Lower the learning rate, or use bfloat16 where float16 overflows",
                RuntimeWarning,
                stacklevel=1,
            )
            scalars["dis/not_finite"] = not_finite
        return scalars

    def state_dict(self) -> dict[str, Tensor]:
        """The states of proposal and generator, and the number of items left out."""
        return {
            **self.proposal.state_dict(),
            **({} if self.budget is None else self.budget.state_dict()),
            "generator": self.generator.get_state(),
            "not_finite": self.not_finite,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a state that :meth:`state_dict` returned: the stream of samples continues from there."""
        self.generator.set_state(state["generator"])
        self.not_finite.copy_(state["not_finite"])
        self.proposal.load_state_dict(state)
        if self.budget is not None and "budget" in state:
            self.budget.load_state_dict(state)
            self._resize()


def _is_known_to_be_finite(signal: Tensor) -> bool:
    """Looks at the sum on a CPU, which saves four passes over the signal; elsewhere the look would wait."""
    return signal.device.type == "cpu" and bool(signal.sum().isfinite())


def make_sampler(
    num_classes: int,
    spec: SamplerSpec | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    shard: VocabShard | None = None,
) -> ClassSampler:
    """Makes a sampler for C classes of a teacher that gives a logit for every class.

    Args:
        num_classes: C >= 1.
        spec: how classes are sampled; sizes that are None take the defaults of a classifier.
        seed: of the sampler's own generator; give every process its own.
        device: of the teacher's targets.
        shard: the classes of which the sampler keeps what it has learnt, where the samplers of other processes keep
            all other classes. All of them have to sample and learn together. None: all classes.

    Raises:
        TypeError: if C is not a whole number.
        ValueError: if C is below 1, or ``spec`` asks for more classes per item than ranks are resolved.
    """
    require_number("num_classes", num_classes, int)
    require(num_classes >= 1, "num_classes", num_classes, "1 or more")
    spec = (spec or SamplerSpec()).resolved()
    # With all classes sampled per item no class is left to share; a truncation has no tail.
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
        proposal = make_proposal(kind, ranks, spec, device, shard)
    sizes = (num_classes, spec.num_sampled_classes, num_shared, spec.num_tails, depth)
    return ClassSampler(proposal, *sizes, spec.design, spec.num_updated_classes, seed)
