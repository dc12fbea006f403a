"""Proposals: the densities over teacher ranks and over classes that samples are taken from.

:class:`DISProposal` is fitted during training. The fixed proposals (teacher, uniform, top-K) are the baselines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_dis.precision import widest
from hf_dis.sampler_spec import SamplerSpec
from hf_dis.sampling.answers import Answers
from hf_dis.sampling.class_memory import ClassMemory
from hf_dis.sampling.rank_proposal import RankProposal
from hf_dis.sampling.sample import Statistics, StepClasses
from hf_dis.sampling.tails import ClassDensity
from hf_dis.teacher.targets import TeacherTargets

if TYPE_CHECKING:
    from hf_dis.head.vocab_shard import VocabShard


class Proposal:
    """A proposal that never learns: uniform over ranks and classes. The base class of all proposals.

    Args:
        num_classes: C.
        num_ranks: the number of ranks that items sample from: m, or C.
        depth: the number of ranks resolved one by one; the ranks below share one density.
        device: of the teacher's targets.
    """

    wants_class_mass = False
    # The classes of :meth:`class_density`, where other processes have all other classes.
    shard: VocabShard | None = None

    def __init__(self, num_classes: int, num_ranks: int, depth: int, device: torch.device | str = "cpu"):
        self.num_classes, self.num_ranks, self.device = num_classes, num_ranks, device
        self.num_entries = depth if depth == num_ranks else depth + 1

    def rank_density(self, answers: Answers | TeacherTargets) -> Tensor:
        """Density over ranks, falling: ``[B]``, or ``[n, B]`` if it depends on the item.

        The last of the B entries is the density of every rank from B-1 on.

        Args:
            answers: the m best-ranked classes of each item and their log-probabilities.
        """
        return torch.ones(self.num_entries, dtype=widest(self.device), device=self.device)

    def class_density(self) -> ClassDensity:
        """Density over classes for the shared tail."""
        return ClassDensity(torch.ones(self.num_classes, dtype=widest(self.device), device=self.device))

    def statistics(self, sample: StepClasses, signal: Tensor) -> Statistics:
        """The sums over a step that the proposal learns from, dense or sparse; empty if the proposal never learns.

        Args:
            sample: the classes, and the items with a finite signal, which alone count.
            signal: as for :meth:`hf_dis.ClassSampler.learn`, ``[N, R + K_t]``.
        """
        return {}

    def update(self, statistics: Statistics) -> None:
        """Learns from the statistics of a step, with the same result on every process.

        Args:
            statistics: as :meth:`statistics` gives them, ``items`` and ``not_finite``, the numbers of items with and
                without a finite signal, all summed over processes.
        """

    def scalars(self) -> dict[str, float]:
        """Numbers of the proposal to log, by name."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the proposal has learnt, to resume from."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a state that :meth:`state_dict` returned."""


class TopKProposal(Proposal):
    """The K best-ranked classes, always: a truncation, biased; kept as a baseline.

    Args:
        num_classes, num_ranks, depth, device: as for :class:`Proposal`.
        num_sampled: K.
    """

    def __init__(
        self,
        num_classes: int,
        num_ranks: int,
        depth: int,
        num_sampled: int,
        device: torch.device | str = "cpu",
    ):
        super().__init__(num_classes, num_ranks, depth, device)
        self.num_sampled = num_sampled

    def rank_density(self, answers: Answers | TeacherTargets) -> Tensor:
        """One for the first K ranks, zero for all other ranks, ``[B]``."""
        return (torch.arange(self.num_entries, device=self.device) < self.num_sampled).to(widest(self.device))


class TeacherProposal(Proposal):
    """The teacher's own distribution: fixed teacher importance sampling (FTIS), the paper's main baseline.

    The density of the shared tail is the teacher's running class marginal.

    Args:
        num_classes, num_ranks, depth, device: as for :class:`Proposal`.
        floor: the uniform share, in (0, 1].
        decay: of the marginal's running mean, in [0, 1).
        shard: as for :class:`ClassMemory`.
    """

    wants_class_mass = True

    def __init__(
        self,
        num_classes: int,
        num_ranks: int,
        depth: int,
        floor: float,
        decay: float,
        device: torch.device | str = "cpu",
        shard: VocabShard | None = None,
    ):
        super().__init__(num_classes, num_ranks, depth, device)
        self.floor, self.shard = floor, shard
        self.memory = ClassMemory(num_classes, decay, device, shard)

    def rank_density(self, answers: Answers | TeacherTargets) -> Tensor:
        """The teacher's probabilities by rank, mixed with the uniform share, ``[n, B]``."""
        density = answers.log_probs.to(widest(self.device)).exp()
        if self.num_entries > density.shape[1]:
            below = (1 - density.sum(1, keepdim=True)).clamp_min(0) / (self.num_ranks - density.shape[1])
            density = torch.cat([density, torch.minimum(below, density[:, -1:])], 1)
        return (1 - self.floor) * density + self.floor / self.num_ranks

    def class_density(self) -> ClassDensity:
        """The teacher's marginal, mixed with the uniform share."""
        return self.memory.density(self.floor, signal_share=0.0)

    def statistics(self, sample: StepClasses, signal: Tensor) -> Statistics:
        """As :meth:`ClassMemory.statistics`; empty where there is no shared tail."""
        return self.memory.statistics(sample, signal) if len(sample.class_mass) else {}

    def update(self, statistics: Statistics) -> None:
        """As :meth:`ClassMemory.update`."""
        self.memory.update(statistics)

    def state_dict(self) -> dict[str, Tensor]:
        """The class memory's state."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a state that :meth:`state_dict` returned."""
        self.memory.load_state_dict(state)


class DISProposal(Proposal):
    """Dynamic importance sampling: a fitted :class:`RankProposal`, and a :class:`ClassMemory` for the shared tail.

    Args:
        num_classes, num_ranks, depth, device: as for :class:`Proposal`.
        floor: the uniform share, in (0, 1].
        decay: of the running means, in [0, 1).
        shard: as for :class:`ClassMemory`.
    """

    wants_class_mass = True

    def __init__(
        self,
        num_classes: int,
        num_ranks: int,
        depth: int,
        floor: float,
        decay: float,
        device: torch.device | str = "cpu",
        shard: VocabShard | None = None,
    ):
        super().__init__(num_classes, num_ranks, depth, device)
        self.floor, self.shard = floor, shard
        self.ranks = RankProposal(num_ranks, floor, decay, device)
        self.memory = ClassMemory(num_classes, decay, device, shard)

    def rank_density(self, answers: Answers | TeacherTargets) -> Tensor:
        """The fitted mixture, ``[B]``."""
        return self.ranks.density(self.num_entries)

    def class_density(self) -> ClassDensity:
        """Signal and teacher's marginal, mixed with the uniform share."""
        return self.memory.density(self.floor)

    def statistics(self, sample: StepClasses, signal: Tensor) -> Statistics:
        """Those of the ranks, unless all of them are certain, and those of the classes, if there is a shared tail."""
        statistics = {} if sample.all_ranks_certain else self.ranks.statistics(sample, signal)
        if sample.tail_ids.numel():
            statistics |= self.memory.statistics(sample, signal)
        return statistics

    def update(self, statistics: Statistics) -> None:
        """As :meth:`RankProposal.update` and :meth:`ClassMemory.update`."""
        if "rank_squared" in statistics:
            self.ranks.update(statistics)
        if "tail" in statistics:
            self.memory.update(statistics)

    def scalars(self) -> dict[str, float]:
        """The weight of each component, ``dis/laplace_<scale>``; none where all ranks are certain."""
        if not self.ranks.observed:
            return {}
        weights = zip(self.ranks.scales.tolist(), self.ranks.weights.tolist(), strict=True)
        return {f"dis/laplace_{scale:g}": weight for scale, weight in weights}

    def state_dict(self) -> dict[str, Tensor]:
        """The states of ranks and classes."""
        return self.ranks.state_dict() | self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a state that :meth:`state_dict` returned."""
        self.ranks.load_state_dict(state)
        self.memory.load_state_dict(state)


def make_proposal(
    kind: type[Proposal],
    ranks: tuple[int, int, int],
    spec: SamplerSpec,
    device: torch.device | str,
    shard: VocabShard | None = None,
) -> Proposal:
    """Makes a proposal of a kind; a proposal that learns takes floor and decay from the specification.

    Args:
        kind: the class of the proposal.
        ranks: C, the number of ranks that items sample from, and the number of ranks resolved one by one.
        spec: how classes are sampled.
        device: of the teacher's targets.
        shard: as for :func:`hf_dis.make_sampler`.
    """
    if kind is Proposal:
        return Proposal(*ranks, device=device)
    return kind(*ranks, floor=spec.proposal_floor, decay=spec.proposal_decay, device=device, shard=shard)
