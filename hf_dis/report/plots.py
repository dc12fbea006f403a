"""The plot of a proposal at some steps, as SVG; needs matplotlib.

Figures are made without pyplot, which needs a display and keeps every figure in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from hf_dis.report.style import ORANGE, plotted, write_svg
from hf_dis.sampling.rank_proposal import RankProposal


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
        path: of the SVG.
        snapshots: one for each panel, taken after the first step: nothing is measured before.
    """
    with plotted():
        figure = Figure(figsize=(3.4 * len(snapshots), 3.2), layout="constrained")
        for axis, shot in zip(figure.subplots(1, len(snapshots), squeeze=False)[0], snapshots, strict=True):
            measured = shot.measured / (shot.measured * shot.edges.diff()).sum()
            axis.stairs(measured, shot.edges + 1, label="measured disagreement")
            axis.plot(range(1, len(shot.fitted) + 1), shot.fitted, label="fitted proposal", color=ORANGE)
            axis.set(
                xscale="log", yscale="log", title=f"step {shot.step}", xlabel="rank of the class, teacher's order"
            )
        figure.axes[0].set_ylabel("density")
        figure.axes[0].legend(frameon=False)
    write_svg(figure, path)
