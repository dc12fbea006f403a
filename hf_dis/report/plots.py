"""Plots of a training run; needs matplotlib. Figures are drawn without pyplot, so no display or state is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from hf_dis.sampling.rank_proposal import RankProposal

Log = dict[str, float]


class ProposalSnapshot(NamedTuple):
    """A proposal over ranks at a step of training, on the CPU.

    Attributes:
        step: of training.
        edges: of the bins of ranks, ``[bins + 1]``.
        measured: disagreement of teacher and student, up to a factor, ``[bins]``.
        fitted: the proposal's density, ``[ranks]``.
    """

    step: int
    edges: Tensor
    measured: Tensor
    fitted: Tensor

    @classmethod
    def of(cls, ranks: RankProposal, step: int) -> ProposalSnapshot:
        """What a proposal looks like now."""
        return cls(step, ranks.edges.double().cpu(), ranks.profile().cpu(), ranks.density(ranks.num_ranks).cpu())


def plot_proposal(path: Path, snapshots: Sequence[ProposalSnapshot]) -> None:
    """The fitted Laplace mixture against the measured disagreement, at a few steps of training.

    Args:
        path: of the PNG.
        snapshots: a panel each; taken after the first step, as nothing is measured before.
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
    """Logged values over steps.

    Args:
        path: of the PNG.
        log_history: a trainer's ``state.log_history``.
        panels: the names to show in each.

    Returns:
        whether there was anything to plot; if not, no file is written.
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
