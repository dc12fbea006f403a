"""The methods that estimator_error.py and proposal_variants.py compare: a proposal, a design and a layout each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_dis import ClassSampler, SamplerSpec, make_sampler
from hf_dis.head.sampled_linear import sampled_columns
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.sampling.proposal import Proposal
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.targets import TeacherTargets


class OracleProposal(Proposal):
    """q ∝ |s - p|, which needs every student logit; no proposal over ranks or classes can be much better."""

    def look(self, signal: Tensor, targets: TeacherTargets) -> None:
        """Sees the whole ``s - p [N, C]`` of the items whose classes are sampled next."""
        self.signal = signal.abs()
        self.outside_top = self.signal.scatter(1, targets.ids, 0)

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        density = self.signal.gather(1, targets.ids).double()
        return 0.95 * density / density.sum(1, keepdim=True) + 0.05 / self.num_ranks

    def class_density(self) -> Tensor:
        density = self.outside_top.double().square().sum(0).sqrt()
        return 0.95 * density / density.sum() + 0.05 / self.num_classes


@dataclass
class Method:
    """A proposal, a design and a layout.

    Attributes:
        proposal: one of the library's, or ``"oracle"``.
        design: ``"pps"``, ``"replacement"``, or ``"none"`` for a truncation.
        sampled, shared, tails: K, K_t and G.
        depth: m; None resolves every rank.
        updated: U; None lets all sampled classes update the head.
        sampler: samples the classes, once :meth:`build` has run.
    """

    proposal: str
    design: str
    sampled: int
    shared: int = 0
    depth: int | None = None
    tails: int = 1
    updated: int | None = None
    sampler: ClassSampler = field(init=False)

    def build(self, num_classes: int, device: torch.device) -> None:
        """Makes the sampler for C classes on a device."""
        if self.proposal != "oracle":
            self.sampler = self.sampler_of(num_classes, self.proposal, device)
            return
        depth = self.depth or num_classes
        proposal = OracleProposal(num_classes, depth if self.shared else num_classes, depth, device)
        sizes = (num_classes, self.sampled, self.shared, self.tails, depth)
        self.sampler = ClassSampler(proposal, *sizes, self.design)

    def sampler_of(self, num_classes: int, proposal: str, device: torch.device) -> ClassSampler:
        """The library's sampler with a proposal of the library, in this layout."""
        spec = SamplerSpec(
            num_sampled_classes=self.sampled,
            num_shared_classes=self.shared,
            num_tails=self.tails,
            num_updated_classes=self.updated,
            rank_depth=self.depth or num_classes,
            proposal=proposal,
            design="pps" if self.design == "none" else self.design,
        )
        return make_sampler(num_classes, spec, device=device)

    def rows_touched(self, num_items: int) -> int:
        """Rows of W in the gradient of a step, at most."""
        sampled = num_items * self.sampled + self.tails * self.shared
        return sampled if self.updated is None else min(sampled, num_items * self.updated)

    def sample(self, teacher_logits: Tensor, signal: Tensor, temperature: float) -> ClassSample:
        """Samples classes for items, of which only the oracle sees the signal ``s - p [N, C]``."""
        targets = TeacherTargets(teacher_logits, temperature, self.sampler.rank_depth)
        if self.proposal == "oracle":
            self.sampler.proposal.look(signal, targets)
        return self.sampler.sample([targets])

    def learn(self, teacher_logits: Tensor, logits: Tensor, temperature: float) -> None:
        """Lets the proposal learn from a sample of a training step, if the proposal learns."""
        if self.proposal == "dis" or (self.proposal == "teacher" and self.shared):
            self.learn_from(self.sample(teacher_logits, logits, temperature), logits, temperature)

    def learn_from(self, sample: ClassSample, logits: Tensor, temperature: float) -> None:
        """Lets the proposal learn from a sample and the student's logits ``[N, C]``."""
        columns = sampled_columns(logits, sample.item_ids, sample.tail_ids)
        self.sampler.learn(sample, sampled_forward_kl(columns, sample, temperature).signal)


def lm_methods() -> list[Method]:
    """The layout of language models with every density of the tail, and with tails of other sizes."""
    return (
        [Method(proposal, "pps", 16, 1024, 16) for proposal in ("dis", "teacher", "uniform", "oracle")]
        + [
            Method("dis", "pps", sampled, shared, depth)
            for sampled, shared, depth in ((16, 256, 16), (16, 4096, 16), (8, 1024, 8), (64, 1024, 64), (32, 1024, 64))
        ]
        + [Method("dis", "pps", 16, shared, 16, tails=4) for shared in (1024, 4096)]
    )


def glyph_methods() -> list[Method]:
    """Every proposal and design item by item, and with shared tails."""
    per_item = [
        Method(proposal, design, sampled)
        for sampled in (32, 128)
        for proposal, design in (
            ("dis", "pps"),
            ("dis", "replacement"),
            ("teacher", "pps"),
            ("teacher", "replacement"),
            ("uniform", "pps"),
            ("uniform", "replacement"),
            ("topk", "none"),
            ("oracle", "pps"),
            ("oracle", "replacement"),
        )
    ]
    two_strata = [
        Method(proposal, "pps", sampled, shared, depth)
        for depth, sampled, shared in ((64, 32, 256), (64, 32, 512), (256, 64, 256), (256, 96, 512))
        for proposal in ("dis", "uniform")
    ]
    several_tails = [
        Method("dis", "pps", sampled, shared, 2 * sampled, tails)
        for sampled, shared, tails in ((32, 256, 8), (32, 512, 4), (32, 512, 8), (64, 256, 16), (64, 512, 4))
    ]
    updated = [
        Method("dis", "pps", 128, updated=16),
        Method("dis", "pps", 32, 512, 64, 4, 16),
        Method("dis", "pps", 32, 512, 64, 4, 8),
        Method("dis", "pps", 64, 1024, 128, 4, 16),
    ]
    return per_item + two_strata + several_tails + updated
