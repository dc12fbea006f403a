"""Where to sample classes: proposals over teacher ranks and over classes.

The dynamic proposal over ranks, a mixture of Laplace distributions fitted to the disagreement of teacher and
student, is the idea of arXiv 1812.00914; its online fit, and the density over classes for the tails that items
share, are this project's. The fixed proposals (teacher, uniform, top-K) are the baselines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dis.sampling.class_memory import ClassMemory
from hf_dis.sampling.rank_proposal import RankProposal
from hf_dis.sampling.sample import ClassSample, Statistics
from hf_dis.teacher.targets import TeacherTargets


class Proposal:
    """A proposal that never learns: uniform over ranks and classes. The base of the others.

    Args:
        num_classes: C.
        num_ranks: ranks that items sample from, m or C.
        depth: ranks resolved one by one; the ranks below share one density.
        device: where the teacher's targets are.
    """

    wants_class_mass = False

    def __init__(self, num_classes: int, num_ranks: int, depth: int, device: torch.device | str = "cpu"):
        self.num_classes, self.num_ranks, self.device = num_classes, num_ranks, device
        self.num_entries = depth if depth == num_ranks else depth + 1

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        """Density over ranks, falling: ``[B]``, or ``[n, B]`` if it depends on the item. The last of the B entries
        stands for every rank from B-1 on."""
        return torch.ones(self.num_entries, dtype=torch.float64, device=self.device)

    def class_density(self) -> Tensor:
        """Density over classes for the shared tail, positive, ``[C]``."""
        return torch.ones(self.num_classes, dtype=torch.float64, device=self.device)

    def statistics(self, sample: ClassSample, signal: Tensor) -> Statistics:
        """What the proposal learns from a step, as tensors, dense or sparse, to be summed over processes.

        Args:
            sample: the classes sampled.
            signal: s - p, student minus teacher probability at the temperature, ``[N, R + K_t]``.
        """
        return {}

    def update(self, statistics: Statistics) -> None:
        """Learns from the statistics of a step; the same on every process."""

    def scalars(self) -> dict[str, float]:
        """What to log of the proposal."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the proposal has learnt, to resume from."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave."""


class TopKProposal(Proposal):
    """The K best-ranked classes, always: a truncation, biased; kept as a baseline."""

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

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        return (torch.arange(self.num_entries, device=self.device) < self.num_sampled).double()


class TeacherProposal(Proposal):
    """The teacher's own distribution: fixed teacher importance sampling (FTIS), the paper's main baseline.

    A share ``floor`` of it is uniform. The tail's density is the teacher's running class marginal.
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
    ):
        super().__init__(num_classes, num_ranks, depth, device)
        self.floor = floor
        self.memory = ClassMemory(num_classes, decay, device)

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        density = targets.log_probs.double().exp()
        if self.num_entries > density.shape[1]:
            below = (1 - density.sum(1, keepdim=True)).clamp_min(0) / (self.num_ranks - density.shape[1])
            density = torch.cat([density, torch.minimum(below, density[:, -1:])], 1)
        return (1 - self.floor) * density + self.floor / self.num_ranks

    def class_density(self) -> Tensor:
        return self.memory.density(self.floor, signal_share=0.0)

    def statistics(self, sample: ClassSample, signal: Tensor) -> Statistics:
        return self.memory.statistics(sample, signal) if len(sample.class_mass) else {}

    def update(self, statistics: Statistics) -> None:
        if statistics:
            self.memory.update(statistics)

    def state_dict(self) -> dict[str, Tensor]:
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.memory.load_state_dict(state)


class DISProposal(Proposal):
    """Dynamic importance sampling: a fitted :class:`RankProposal`, and a :class:`ClassMemory` for the tail."""

    wants_class_mass = True

    def __init__(
        self,
        num_classes: int,
        num_ranks: int,
        depth: int,
        floor: float,
        decay: float,
        device: torch.device | str = "cpu",
    ):
        super().__init__(num_classes, num_ranks, depth, device)
        self.floor = floor
        self.ranks = RankProposal(num_ranks, floor, decay, device)
        self.memory = ClassMemory(num_classes, decay, device)

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        return self.ranks.density(self.num_entries)

    def class_density(self) -> Tensor:
        return self.memory.density(self.floor)

    def statistics(self, sample: ClassSample, signal: Tensor) -> Statistics:
        statistics = self.ranks.statistics(sample, signal)
        if sample.tail_ids.numel():
            statistics |= self.memory.statistics(sample, signal)
        return statistics

    def update(self, statistics: Statistics) -> None:
        self.ranks.update(statistics)
        if "tail" in statistics:
            self.memory.update(statistics)

    def scalars(self) -> dict[str, float]:
        weights = zip(self.ranks.scales.tolist(), self.ranks.weights.tolist(), strict=True)
        return {f"dis/laplace_{scale:g}": weight for scale, weight in weights}

    def state_dict(self) -> dict[str, Tensor]:
        return self.ranks.state_dict() | self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.ranks.load_state_dict(state)
        self.memory.load_state_dict(state)
