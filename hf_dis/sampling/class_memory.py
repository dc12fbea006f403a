"""Where to sample classes: proposals over teacher ranks and over classes.

The dynamic proposal over ranks, a mixture of Laplace distributions fitted to the disagreement of teacher and
student, is the idea of arXiv 1812.00914; its online fit, and the density over classes for the tails that items
share, are this project's. The fixed proposals (teacher, uniform, top-K) are the baselines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dis.sampling.sample import ClassSample, Statistics
from hf_dis.sampling.tails import by_tail


class ClassMemory:
    """How much teacher and student disagree on each class outside the items' ranked heads.

    Keeps a running mean of ``(s - p)²``, renewed only at classes that were sampled, and the teacher's running class
    marginal, which is known for every class and follows the data at once.

    Args:
        num_classes: C.
        decay: of the marginal's running mean, in [0, 1).
    """

    # A class is sampled rarely, so what a sample says of it has to count at once.
    RENEWAL = 0.3

    def __init__(self, num_classes: int, decay: float, device: torch.device | str = "cpu"):
        self.decay = decay
        # An untrained student is close to uniform and so disagrees by about 1/C everywhere.
        self.squared_signal = torch.full((num_classes,), num_classes**-2.0, device=device)
        self.marginal = torch.zeros(num_classes, device=device)

    def density(self, floor: float, signal_share: float = 0.5) -> Tensor:
        """Disagreement and marginal, each normalised, mixed; plus a uniform floor. Float64, ``[C]``."""
        signal = self.squared_signal.sqrt()
        share = (1 - floor) * signal_share / signal.sum(dtype=torch.float64).clamp_min(1e-30)
        rest = (1 - floor) * (1 - signal_share) / self.marginal.sum(dtype=torch.float64).clamp_min(1e-30)
        mixed = signal.mul_(share).addcmul_(self.marginal, rest.float())
        return mixed.double().add_(floor / len(mixed))

    def statistics(self, sample: ClassSample, signal: Tensor) -> Statistics:
        """Of each sampled class, Σ (s - p)² over the items that met it outside their heads and how many did, a sparse
        ``[C, 2]``; the teacher's mass of every class; the items."""
        num_tails, num_shared = sample.tail_ids.shape
        squared = signal[:, signal.shape[1] - num_shared :].square().masked_fill(~sample.outside_top, 0)
        sums = [by_tail(values, num_tails).sum(1).flatten() for values in (squared, sample.outside_top)]
        met, shape = torch.stack(sums, 1).float(), (len(self.marginal), 2)
        return {
            "tail": torch.sparse_coo_tensor(sample.tail_ids.reshape(1, -1), met, shape, check_invariants=False),
            "class_mass": sample.class_mass,
            "items": met.new_full((), len(sample)),
        }

    def update(self, statistics: Statistics) -> None:
        """Takes the statistics of a step (summed over processes) into the running means."""
        tail = statistics["tail"].coalesce()
        ids, (squared, items) = tail._indices()[0], tail._values().unbind(1)
        known = self.squared_signal[ids]
        mean = torch.where(items > 0, squared / items.clamp_min(1), known)
        self.squared_signal.index_copy_(0, ids, known.lerp(mean, self.RENEWAL))
        # A process without an item, and so all of them in such a step, has seen nothing.
        num_items = statistics["items"]
        marginal = (statistics["class_mass"] / num_items.clamp_min(1)).float()
        self.marginal.lerp_(marginal, (1 - self.decay) * (num_items > 0))

    def state_dict(self) -> dict[str, Tensor]:
        return {"class_squared_signal": self.squared_signal, "class_marginal": self.marginal}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.squared_signal.copy_(state["class_squared_signal"])
        self.marginal.copy_(state["class_marginal"])
