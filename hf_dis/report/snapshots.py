"""Snapshots of a fitted proposal, small enough for a line of JSON."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_dis.sampling.rank_proposal import RankProposal

# Snapshots of a training: enough for a slider.
SNAPSHOTS = 40


def snapshot(ranks: RankProposal) -> dict[str, Any]:
    """The measured signal and the fitted proposal as densities over bins of ranks.

    Args:
        ranks: after its first update: nothing is measured before.

    Returns:
        ``edges`` of the bins, ``[bins + 1]``; ``measured`` and ``fitted``, ``[bins]``, each of which sums to one over
        the ranks. A signal of zero has a ``measured`` of zeros.
    """
    edges = ranks.edges.cpu()
    sizes = edges.diff().double()
    cumulated = torch.nn.functional.pad(ranks.density(ranks.num_ranks).cpu().double().cumsum(0), (1, 0))
    measured = ranks.profile().cpu().double()
    measured = measured / (measured * sizes).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "edges": edges.tolist(),
        "measured": _rounded(measured),
        "fitted": _rounded(cumulated[edges].diff() / sizes),
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
