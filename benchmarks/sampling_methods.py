"""The methods that estimator_error.py and proposal_variants.py compare: a proposal, a design and a layout each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hf_dis import ClassSampler, SamplerSpec, make_sampler
from hf_dis.head.sampled_linear import sampled_columns, sampled_logits
from hf_dis.loss.divergence import FORWARD_KL, Divergence
from hf_dis.sampling.proposal import Proposal
from hf_dis.sampling.sample import ClassSample, Stratum
from hf_dis.sampling.tails import ClassDensity, of_items
from hf_dis.teacher.targets import TeacherTargets


class OracleProposal(Proposal):
    """q ∝ |dL/dz|, |s - p| for the forward KL, which needs every student logit.

    No proposal over ranks or classes can be much better.
    """

    def look(self, signal: Tensor, targets: TeacherTargets) -> None:
        """Sees the whole signal ``[N, C]`` of the items whose classes are sampled next."""
        self.signal = signal.abs()
        self.outside_top = self.signal.scatter(1, targets.ids, 0)

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        density = self.signal.gather(1, targets.ids).double()
        return 0.95 * density / density.sum(1, keepdim=True) + 0.05 / self.num_ranks

    def class_density(self) -> ClassDensity:
        density = self.outside_top.double().square().sum(0).sqrt()
        return ClassDensity(0.95 * density / density.sum() + 0.05 / self.num_classes)


@dataclass
class Method:
    """A proposal, a design and a layout.

    Attributes:
        proposal: one of the library's, or ``"oracle"``.
        design: ``"pps"``, ``"replacement"``, or ``"none"`` for a truncation.
        sampled, shared, tails: K, K_t and G.
        depth: m; None resolves every rank.
        updated: U; None lets all sampled classes update the head.
        divergence: of the student from the teacher.
        sampler: samples the classes, once :meth:`build` has run.
    """

    proposal: str
    design: str
    sampled: int
    shared: int = 0
    depth: int | None = None
    tails: int = 1
    updated: int | None = None
    divergence: Divergence = FORWARD_KL
    sampler: ClassSampler = field(init=False)

    @property
    def name(self) -> str:
        """The name in tables."""
        return self.proposal

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

    def sample(
        self, teacher_logits: Tensor, signal: Tensor, temperature: float, labels: Tensor | None = None
    ) -> ClassSample:
        """Samples classes for items, of which only the oracle sees the signal ``[N, C]``; labels are in the sample."""
        targets = TeacherTargets(teacher_logits, temperature, self.sampler.rank_depth)
        if self.proposal == "oracle":
            self.sampler.proposal.look(signal, targets)
        return self.sampler.sample([targets], labels)

    def learn(self, teacher_logits: Tensor, logits: Tensor, temperature: float, labels: Tensor | None = None) -> None:
        """Lets the proposal learn from a sample of a training step, if the proposal learns."""
        if self.proposal == "dis" or (self.proposal == "teacher" and self.shared):
            self.learn_from(self.sample(teacher_logits, logits, temperature, labels), logits, temperature)

    def learn_from(self, sample: ClassSample, logits: Tensor, temperature: float) -> None:
        """Lets the proposal learn from a sample and the student's logits ``[N, C]``."""
        columns = sampled_columns(logits, sample.item_ids, sample.tail_ids)
        self.sampler.learn(sample, self.divergence.sampled(columns, sample, temperature).signal)

    def gradients(
        self,
        head: nn.Linear,
        features: Tensor,
        teacher_logits: Tensor,
        signal: Tensor,
        temperature: float,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The gradients of the mean loss on the features ``[N, d]`` and the head's weights ``[C, d]``."""
        sample = self.sample(teacher_logits, signal, temperature, labels)
        sample = self.completed(sample, head, features, teacher_logits, temperature)
        ids = sample.item_ids, sample.tail_ids
        columns = sampled_logits(features, head.weight, head.bias, *ids, updates=sample.updates)
        loss = self.divergence.sampled(columns, sample, temperature).loss
        return torch.autograd.grad(loss.mean(), (features, head.weight))

    def completed(
        self, sample: ClassSample, head: nn.Linear, features: Tensor, teacher_logits: Tensor, temperature: float
    ) -> ClassSample:
        """The sample with the classes that a method adds for the student as it is; here none."""
        return sample


@dataclass
class Screened(Method):
    """A sample that also holds the student's likeliest classes, each with certainty.

    A student that writes text computes all logits on the way, and could record these classes. For other data a screen
    of the head would have to find them; no screen can find better ones.

    Attributes:
        screened: the number of these classes per item.
    """

    screened: int = 8

    @property
    def name(self) -> str:
        """As :attr:`Method.name`."""
        return f"{self.proposal}, student's top {self.screened}"

    def completed(
        self, sample: ClassSample, head: nn.Linear, features: Tensor, teacher_logits: Tensor, temperature: float
    ) -> ClassSample:
        """The sample with the student's likeliest classes."""
        ids = head(features.detach()).topk(self.screened, dim=1).indices
        log_probs = (teacher_logits / temperature).log_softmax(1).gather(1, ids)
        return with_certain(sample, ids, log_probs)


def with_certain(sample: ClassSample, ids: Tensor, log_probs: Tensor) -> ClassSample:
    """Adds certain classes to a sample whose own columns are all certain.

    Args:
        sample: of N items.
        ids: the classes, each once per item, ``[N, k]``.
        log_probs: the teacher's, ``[N, k]``.
    """
    num_own = sample.item_ids.shape[1]
    tails = of_items(sample.tail_ids, 0, len(ids))
    is_held = (ids[:, :, None] == sample.item_ids[:, None]).any(2)
    in_tail = (tails[:, :, None] == ids[:, None]).any(2)
    own, shared = sample.log_weights.split([num_own, tails.shape[1]], 1)
    added = torch.zeros_like(log_probs).masked_fill_(is_held, -torch.inf)
    stratum = Stratum(
        ids=torch.cat([ids, sample.item_ids, tails], 1),
        log_weights=torch.cat([added, own, shared.masked_fill(in_tail, -torch.inf)], 1),
        certain=torch.cat([torch.ones_like(is_held), sample.certain], 1),
        log_probs=torch.cat([log_probs, sample.log_probs], 1),
        mass=log_probs.new_ones(len(ids)),
    )
    return replace(
        sample,
        item_ids=torch.cat([ids, sample.item_ids], 1),
        log_weights=stratum.log_weights,
        certain=stratum.certain,
        log_probs=stratum.log_probs,
        target=stratum.target(),
    )


@dataclass
class Truncation(Method):
    """The K likeliest classes of teacher or student as the whole, as in top-K distillation; ``proposal`` is its name.

    The probabilities are those of a softmax over all classes, so that every logit is computed.

    Attributes:
        of_student: the classes are the student's likeliest ones, not the teacher's.
        has_bucket: all other classes count as one; without this bucket both models are normalised over the K classes.
    """

    of_student: bool = False
    has_bucket: bool = False

    def build(self, num_classes: int, device: torch.device) -> None:
        """Makes nothing: no class is sampled."""

    def learn(self, teacher_logits: Tensor, logits: Tensor, temperature: float, labels: Tensor | None = None) -> None:
        """Learns nothing."""

    def gradients(
        self,
        head: nn.Linear,
        features: Tensor,
        teacher_logits: Tensor,
        signal: Tensor,
        temperature: float,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        logits = head(features)
        log_probs = [(values / temperature).log_softmax(1) for values in (logits, teacher_logits)]
        ids = log_probs[0 if self.of_student else 1].topk(self.sampled, dim=1).indices
        student, teacher = (self._shortened(values, ids) for values in log_probs)
        # The shortened log-probabilities at temperature 1 have the loss of the whole ones, up to the factor τ².
        _, slope = self.divergence.exact(student.detach(), teacher, 1.0)
        slope *= temperature**2 / len(features)
        return torch.autograd.grad(student, (features, head.weight), slope)

    def _shortened(self, log_probs: Tensor, ids: Tensor) -> Tensor:
        kept = log_probs.gather(1, ids)
        return with_bucket(kept) if self.has_bucket else kept


def with_bucket(log_probs: Tensor) -> Tensor:
    """Adds the log-probability of all remaining classes, ``[n, K + 1]`` for ``[n, K]``, at least log 1e-7."""
    rest = (-log_probs.logsumexp(1, keepdim=True).clamp_max(-1e-7).expm1()).log()
    return torch.cat([log_probs, rest], 1)


def truncations(sampled: int) -> list[Method]:
    """Truncations to K classes, of the teacher's and the student's likeliest, with and without a bucket."""
    return [
        Truncation(f"{name}{' and bucket' * bucket}", "none", sampled, of_student=student, has_bucket=bucket)
        for student, name in ((False, "teacher's top"), (True, "student's top"))
        for bucket in (False, True)
    ]


def default_methods(layout: tuple[int, ...]) -> list[Method]:
    """Every proposal in one layout (K, K_t, m, G), and truncations to as many classes of an item.

    Where all ranked classes are certain, K = m, there is the sample with the student's likeliest classes too. They
    replace a half of the ranked ones.
    """
    proposals = [Method(proposal, "pps", *layout) for proposal in ("dis", "teacher", "uniform", "oracle")]
    sampled, shared, depth, tails = layout
    if sampled == depth:
        half = sampled // 2
        proposals.append(Screened("dis", "pps", half, shared, half, tails, screened=half))
    return proposals + truncations(sampled + shared)


# The layouts (K, K_t, m, G) that a Trainer takes if none is given.
GLYPH_DEFAULT, LM_DEFAULT = (32, 512, 64, 16), (16, 1024, 16, 16)


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
