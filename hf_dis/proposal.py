"""Where to draw classes: proposals over teacher ranks and over classes.

The dynamic proposal over ranks, a mixture of Laplace distributions fitted to the disagreement of teacher and
student, is the idea of arXiv 1812.00914; its online fit, and the density over classes for the tails that rows
share, are this project's. The fixed proposals (teacher, uniform, top-K) are the baselines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sampling import by_tail

if TYPE_CHECKING:
    from .sampling import ClassDraw
    from .targets import TeacherTargets

Statistics = dict[str, Tensor]


class Proposal:
    """A proposal that never learns: uniform over ranks and classes. The base of the others.

    Args:
        num_classes: C.
        num_ranks: ranks that rows draw from, m or C.
        depth: ranks resolved one by one; the ranks below share one density.
        device: where the teacher's targets are.
    """

    wants_class_mass = False

    def __init__(self, num_classes: int, num_ranks: int, depth: int, device: torch.device | str = "cpu"):
        self.num_classes, self.num_ranks, self.device = num_classes, num_ranks, device
        self.num_entries = depth if depth == num_ranks else depth + 1

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        """Density over ranks, falling: ``[B]``, or ``[n, B]`` if it depends on the row. The last of the B entries
        stands for every rank from B-1 on."""
        return torch.ones(self.num_entries, dtype=torch.float64, device=self.device)

    def class_density(self) -> Tensor:
        """Density over classes for the shared tail, positive, ``[C]``."""
        return torch.ones(self.num_classes, dtype=torch.float64, device=self.device)

    def statistics(self, draw: ClassDraw, disagreement: Tensor) -> Statistics:
        """What the proposal learns from a step, as tensors, dense or sparse, to be summed over processes.

        Args:
            draw: the classes drawn.
            disagreement: s - p, student minus teacher probability at the temperature, ``[N, R + K_t]``.
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
        return self.memory.density(self.floor, disagreement_share=0.0)

    def statistics(self, draw: ClassDraw, disagreement: Tensor) -> Statistics:
        return self.memory.statistics(draw, disagreement) if len(draw.class_mass) else {}

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

    def statistics(self, draw: ClassDraw, disagreement: Tensor) -> Statistics:
        statistics = self.ranks.statistics(draw, disagreement)
        if draw.shared_ids.numel():
            statistics |= self.memory.statistics(draw, disagreement)
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


class RankProposal:
    """A mixture of Laplace distributions over ranks, fitted online to where teacher and student disagree.

    ``q(r) = (1 - ε) Σ_j w_j Lap_j(r) + ε / R``: the Laplace densities have their peak at rank 0, are cut to
    0..R-1 and have scales ½, 2, 8, 32, ... up to R. Of all proposals that depend on the rank alone, ``q ∝ D(r) =
    sqrt(mean (s - p)²)`` has the least variance; a running mean of the importance-weighted ``(s - p)²`` at the
    drawn ranks, in bins of ranks, estimates D², and each step moves w by one step of expectation-maximisation.

    Args:
        num_ranks: R.
        floor: ε, the uniform share, in (0, 1].
        decay: of the running mean, in [0, 1).
    """

    def __init__(self, num_ranks: int, floor: float, decay: float, device: torch.device | str = "cpu"):
        self.num_ranks, self.floor, self.decay = num_ranks, floor, decay
        num_scales = 1
        while 0.5 * 4**num_scales <= num_ranks:
            num_scales += 1
        self.scales = 0.5 * 4.0 ** torch.arange(num_scales, dtype=torch.float64, device=device)
        self.edges = _rank_bins(num_ranks).to(device)
        self.bin_sizes = self.edges.diff().double()
        self.component_mass = self._cumulative(self.edges).diff(dim=1)
        self.weights = torch.full_like(self.scales, 1 / num_scales)
        self.squared_disagreement = torch.zeros_like(self.bin_sizes)
        self.observed = self.bin_sizes.new_zeros(())

    def _cumulative(self, ranks: Tensor) -> Tensor:
        """Each component's probability of the ranks before the given ones, ``[J, len(ranks)]``."""
        scales = self.scales[:, None]
        return torch.expm1(-ranks / scales) / torch.expm1(-self.num_ranks / scales)

    def density(self, num_entries: int) -> Tensor:
        """q(r) of the first ranks, ``[num_entries]``; the last entry is the mean over all ranks from there on."""
        edges = torch.arange(num_entries + 1, dtype=torch.float64, device=self.weights.device)
        edges[-1] = self.num_ranks
        mixture = self.weights @ (self._cumulative(edges).diff(dim=1) / edges.diff())
        return (1 - self.floor) * mixture + self.floor / self.num_ranks

    def profile(self) -> Tensor:
        """The measured disagreement D(r), one value for each bin of ranks between :attr:`edges`."""
        return (self.squared_disagreement / self.observed.clamp_min(1e-12)).sqrt()

    def statistics(self, draw: ClassDraw, disagreement: Tensor) -> Statistics:
        """Importance-weighted Σ (s - p)² in each bin of ranks, and the number of rows."""
        squared = disagreement[:, : draw.ranks.shape[1]].double().square() * draw.rank_weights
        bins = torch.bucketize(draw.ranks, self.edges[1:], right=True)
        summed = squared.new_zeros(len(self.bin_sizes)).index_add_(0, bins.flatten(), squared.flatten())
        return {"rank_squared": summed, "rows": summed.new_full((), len(draw))}

    def update(self, statistics: Statistics) -> None:
        """Takes the statistics of a step (summed over processes) into the running mean; one EM step on w."""
        rows = statistics["rows"]
        renewal = (1 - self.decay) * (rows > 0)  # a step may have no row: a batch without a supervised token
        self.squared_disagreement.lerp_(statistics["rank_squared"] / (rows.clamp_min(1) * self.bin_sizes), renewal)
        self.observed.lerp_(torch.ones_like(self.observed), renewal)
        wanted = self.bin_sizes * self.profile()
        joint = (1 - self.floor) * self.weights[:, None] * self.component_mass
        proposed = joint.sum(0) + self.floor * self.bin_sizes / self.num_ranks
        # The tiny term keeps the weights where they are while nothing disagrees.
        weights = (joint / proposed) @ wanted + 1e-12 * self.weights
        self.weights = weights / weights.sum()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "rank_weights": self.weights,
            "rank_squared_disagreement": self.squared_disagreement,
            "rank_observed": self.observed,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.weights.copy_(state["rank_weights"])
        self.squared_disagreement.copy_(state["rank_squared_disagreement"])
        self.observed.copy_(state["rank_observed"])


def _rank_bins(num_ranks: int) -> Tensor:
    """Bin edges over ranks, two to an octave: 0, 1, 2, 3, 4, 6, 8, 12, 16, ..., R."""
    edges, octave = [0, 1, 2, 3], 4
    while octave < num_ranks:
        edges += [octave, octave + octave // 2]
        octave *= 2
    return torch.tensor([edge for edge in edges if edge < num_ranks] + [num_ranks])


class ClassMemory:
    """How much teacher and student disagree on each class outside the rows' ranked heads.

    Keeps a running mean of ``(s - p)²``, renewed only at classes that were drawn, and the teacher's running class
    marginal, which is known for every class and follows the data at once.

    Args:
        num_classes: C.
        decay: of the marginal's running mean, in [0, 1).
    """

    # A class is drawn rarely, so what a draw says of it has to count at once.
    RENEWAL = 0.3

    def __init__(self, num_classes: int, decay: float, device: torch.device | str = "cpu"):
        self.decay = decay
        # An untrained student is close to uniform and so disagrees by about 1/C everywhere.
        self.squared_disagreement = torch.full((num_classes,), num_classes**-2.0, device=device)
        self.marginal = torch.zeros(num_classes, device=device)

    def density(self, floor: float, disagreement_share: float = 0.5) -> Tensor:
        """Disagreement and marginal, each normalised, mixed; plus a uniform floor. Float64, ``[C]``."""
        disagreement = self.squared_disagreement.sqrt()
        share = (1 - floor) * disagreement_share / disagreement.sum(dtype=torch.float64).clamp_min(1e-30)
        rest = (1 - floor) * (1 - disagreement_share) / self.marginal.sum(dtype=torch.float64).clamp_min(1e-30)
        mixed = disagreement.mul_(share).addcmul_(self.marginal, rest.float())
        return mixed.double().add_(floor / len(mixed))

    def statistics(self, draw: ClassDraw, disagreement: Tensor) -> Statistics:
        """Of each drawn class, Σ (s - p)² over the rows that met it outside their heads and how many did, a sparse
        ``[C, 2]``; the teacher's mass of every class; the rows."""
        num_tails, num_shared = draw.shared_ids.shape
        squared = disagreement[:, disagreement.shape[1] - num_shared :].square().masked_fill(~draw.outside_head, 0)
        sums = [by_tail(values, num_tails).sum(1).flatten() for values in (squared, draw.outside_head)]
        met, shape = torch.stack(sums, 1).float(), (len(self.marginal), 2)
        return {
            "tail": torch.sparse_coo_tensor(draw.shared_ids.reshape(1, -1), met, shape, check_invariants=False),
            "class_mass": draw.class_mass,
            "rows": met.new_full((), len(draw)),
        }

    def update(self, statistics: Statistics) -> None:
        """Takes the statistics of a step (summed over processes) into the running means."""
        tail = statistics["tail"].coalesce()
        ids, (squared, rows) = tail._indices()[0], tail._values().unbind(1)
        known = self.squared_disagreement[ids]
        mean = torch.where(rows > 0, squared / rows.clamp_min(1), known)
        self.squared_disagreement.index_copy_(0, ids, known.lerp(mean, self.RENEWAL))
        # A process without a row, and so all of them in such a step, has seen nothing.
        num_rows = statistics["rows"]
        marginal = (statistics["class_mass"] / num_rows.clamp_min(1)).float()
        self.marginal.lerp_(marginal, (1 - self.decay) * (num_rows > 0))

    def state_dict(self) -> dict[str, Tensor]:
        return {"class_squared_disagreement": self.squared_disagreement, "class_marginal": self.marginal}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.squared_disagreement.copy_(state["class_squared_disagreement"])
        self.marginal.copy_(state["class_marginal"])
