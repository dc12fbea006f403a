"""The dynamic proposal over teacher ranks.

A mixture of Laplace distributions fitted to the signal is the idea of arXiv 1812.00914; the online fit is this
project's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.precision import widest
from hf_dis.sampling.sample import Statistics, StepClasses


class RankProposal:
    """A mixture of Laplace distributions over ranks, fitted online to the ranks where teacher and student disagree.

    ``q(r) = (1 - ε) Σ_j w_j Lap_j(r) + ε / R``: the Laplace densities have their peak at rank 0, are cut to
    0..R-1 and have scales ½, 2, 8, 32, ... up to R. Of all proposals that depend on the rank alone, ``q ∝ D(r) =
    sqrt(mean g²)``, with the signal g, has the least variance. A running mean of the importance-weighted ``g²`` at the
    sampled ranks, in bins of ranks, estimates D². A step moves w by one iteration of expectation-maximisation.

    Args:
        num_ranks: R.
        floor: ε, the uniform share, in (0, 1].
        decay: of the running mean, in [0, 1).
        device: of the teacher's targets.

    Attributes:
        scales: of the components, ``[J]``.
        weights: w, sums to one, ``[J]``.
        edges: of the bins of ranks, ``[bins + 1]``.
    """

    def __init__(self, num_ranks: int, floor: float, decay: float, device: torch.device | str = "cpu"):
        self.num_ranks, self.floor, self.decay = num_ranks, floor, decay
        num_scales = 1
        while 0.5 * 4**num_scales <= num_ranks:
            num_scales += 1
        self.scales = 0.5 * 4.0 ** torch.arange(num_scales, dtype=widest(device), device=device)
        self.edges = _rank_bins(num_ranks).to(device)
        self.bin_sizes = self.edges.diff().to(self.scales.dtype)
        self._masses = (1 - floor) * self._cumulative(self.edges).diff(dim=1)  # of the bins, without the uniform share
        self._uniform = floor * self.bin_sizes / num_ranks
        self._means: Tensor | None = None  # of the ranks, and the uniform share beside them
        self._rest: Tensor | None = None
        self.weights = torch.full_like(self.scales, 1 / num_scales)
        self.squared_signal = torch.zeros_like(self.bin_sizes)
        self.observed = self.bin_sizes.new_zeros(())
        self._one = torch.ones_like(self.observed)
        self._tiny = torch.full_like(self.scales, 1e-12)  # keeps the weights constant while the signal is zero

    def _cumulative(self, ranks: Tensor) -> Tensor:
        """The probability that a component gives to the ranks before the given ones, ``[J, len(ranks)]``."""
        scales = self.scales[:, None]
        return torch.expm1(-ranks / scales) / torch.expm1(-self.num_ranks / scales)

    def density(self, num_entries: int) -> Tensor:
        """q(r) of the first ranks, ``[num_entries]``; the last entry is the mean over all ranks from there on."""
        if self._means is None or self._means.shape[1] != num_entries:
            edges = torch.arange(num_entries + 1, dtype=self.weights.dtype, device=self.weights.device)
            edges[-1] = self.num_ranks
            self._means = (1 - self.floor) * self._cumulative(edges).diff(dim=1) / edges.diff()
            self._rest = torch.full_like(self._means[0], self.floor / self.num_ranks)
        return torch.addmv(self._rest, self._means.T, self.weights)

    def profile(self) -> Tensor:
        """The measured D(r), one value per bin of ranks between :attr:`edges`."""
        return (self.squared_signal / self.observed.clamp_min(1e-12)).sqrt()

    def statistics(self, sample: StepClasses, signal: Tensor) -> Statistics:
        """Importance-weighted sum of the squared signal in each bin of ranks."""
        dtype, finite = self.weights.dtype, sample.finite
        if finite is not None and uses_triton(signal.device):
            from hf_dis.sampling.triton_learning import rank_sums

            parts = rank_sums(signal, sample.rank_weights, sample.ranks, finite, self.edges, dtype)
            return {"rank_squared": parts.sum(0)}
        squared = signal[:, : sample.ranks.shape[1]].to(dtype).square() * sample.rank_weights
        if finite is not None:
            squared = torch.where(finite[:, None], squared, 0)
        bins = torch.bucketize(sample.ranks, self.edges[1:], right=True)
        return {"rank_squared": torch.zeros_like(self.bin_sizes).index_add_(0, bins.flatten(), squared.flatten())}

    def update(self, statistics: Statistics) -> None:
        """Takes the statistics of a step into the running mean, and w one iteration further.

        Args:
            statistics: ``rank_squared`` as :meth:`statistics` gives it and ``items``, the number of items, both summed
                over processes.
        """
        items = statistics["items"]
        if uses_triton(items.device):
            from hf_dis.sampling.triton_steps import step_ranks

            state = self.squared_signal, self.observed, self.weights, self._masses, self._uniform, self.bin_sizes
            step_ranks(statistics["rank_squared"], items, *state, 1 - self.decay)
            return
        renewal = items.clamp(max=1 - self.decay)  # a batch without a supervised token has no item
        self.squared_signal.lerp_(statistics["rank_squared"] / (items.clamp_min(1) * self.bin_sizes), renewal)
        self.observed.lerp_(self._one, renewal)
        wanted = self.bin_sizes * self.profile()
        proposed = torch.addmv(self._uniform, self._masses.T, self.weights)
        weights = self.weights * torch.addmv(self._tiny, self._masses, wanted / proposed)
        self.weights = weights / weights.sum()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, and the running mean with its own weight."""
        return {
            "rank_weights": self.weights,
            "rank_squared_signal": self.squared_signal,
            "rank_observed": self.observed,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a state that :meth:`state_dict` returned."""
        self.weights.copy_(state["rank_weights"])
        self.squared_signal.copy_(state["rank_squared_signal"])
        self.observed.copy_(state["rank_observed"])


def _rank_bins(num_ranks: int) -> Tensor:
    """Bin edges over ranks, two to an octave: 0, 1, 2, 3, 4, 6, 8, 12, 16, ..., R."""
    edges, octave = [0, 1, 2, 3], 4
    while octave < num_ranks:
        edges += [octave, octave + octave // 2]
        octave *= 2
    return torch.tensor([edge for edge in edges if edge < num_ranks] + [num_ranks])
