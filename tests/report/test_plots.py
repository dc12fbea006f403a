"""The plot of a proposal shows the numbers that it is given."""

import pytest
import torch
from matplotlib.figure import Figure

from hf_dis.report.plots import ProposalSnapshot, plot_proposal
from hf_dis.sampling.rank_proposal import RankProposal


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved."""
    figures, save = [], Figure.savefig

    def remembered(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remembered)
    return figures


def test_the_proposal_and_its_profile_are_densities_over_the_same_ranks(saved, tmp_path):
    ranks = RankProposal(64, floor=0.05, decay=0.5)
    squared = torch.rand(len(ranks.bin_sizes), dtype=torch.float64)
    ranks.update({"rank_squared": squared, "items": torch.tensor(4.0, dtype=torch.float64)})
    plot_proposal(tmp_path / "proposal.svg", [ProposalSnapshot.of(ranks, 3), ProposalSnapshot.of(ranks, 5)])
    assert [axis.get_title() for axis in saved[0].axes] == ["step 3", "step 5"]
    axis = saved[0].axes[0]
    values, edges, _ = axis.patches[0].get_data()
    assert (values * (edges[1:] - edges[:-1])).sum() == pytest.approx(1) and (edges[0], edges[-1]) == (1, 65)
    (line,) = axis.lines
    assert list(line.get_xdata()) == list(range(1, 65)) and sum(line.get_ydata()) == pytest.approx(1)
    torch.testing.assert_close(torch.as_tensor(line.get_ydata()), ranks.density(64))
