"""Plots of a training run; needs matplotlib.

Figures are made without pyplot, which needs a display and keeps every figure in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from hf_dis.sampling.rank_proposal import RankProposal

Log = dict[str, Any]


class ProposalSnapshot(NamedTuple):
    """A proposal over ranks at a step of training, on the CPU.

    Attributes:
        step: of training.
        edges: of the bins of ranks, ``[bins + 1]``.
        measured: the root mean square of the signal by bin and up to a factor, ``[bins]``.
        fitted: the proposal's density, ``[ranks]``.
    """

    step: int
    edges: Tensor
    measured: Tensor
    fitted: Tensor

    @classmethod
    def of(cls, ranks: RankProposal, step: int) -> ProposalSnapshot:
        """A snapshot of a proposal as fitted now, at a step of training."""
        return cls(step, ranks.edges.cpu().double(), ranks.profile().cpu(), ranks.density(ranks.num_ranks).cpu())


def plot_proposal(path: Path, snapshots: Sequence[ProposalSnapshot]) -> None:
    """Plots the fitted Laplace mixture and the measured disagreement of teacher and student.

    Args:
        path: of the PNG.
        snapshots: one for each panel, taken after the first step: nothing is measured before.
    """
    figure = Figure(figsize=(3.4 * len(snapshots), 3.2), layout="constrained")
    for axis, shot in zip(figure.subplots(1, len(snapshots), squeeze=False)[0], snapshots, strict=True):
        measured = shot.measured / (shot.measured * shot.edges.diff()).sum()
        axis.stairs(measured, shot.edges + 1, label="measured disagreement")
        axis.plot(range(1, len(shot.fitted) + 1), shot.fitted, label="fitted proposal", color="tab:orange")
        axis.set(xscale="log", yscale="log", title=f"step {shot.step}", xlabel="rank of the class, teacher's order")
    figure.axes[0].set_ylabel("density")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_curves(path: Path, log_history: Sequence[Log], panels: Sequence[Sequence[str]]) -> bool:
    """Plots logged values over steps.

    Args:
        path: of the PNG.
        log_history: a trainer's ``state.log_history``.
        panels: the logged names of each panel. Names that were never logged are left out.

    Returns:
        False, and no file is written, if none of the names was logged.
    """
    panels = [[name for name in names if any(name in log for log in log_history)] for names in panels]
    panels = [names for names in panels if names]
    if not panels:
        return False
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axis, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            logs = [log for log in log_history if name in log]
            axis.plot([log["step"] for log in logs], [log[name] for log in logs], ".-", label=name)
        axis.set_xlabel("step")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return True
