"""The proposal over ranks: its densities, and the fit to a planted signal."""

from itertools import pairwise

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.sampling.rank_proposal import RankProposal
from hf_dis.teacher.targets import TeacherTargets


def laplace_mixture(weights, num_ranks, floor):
    """q(r) by definition, for every rank: scales ½, 2, 8, ... around rank 0, cut to 0..R-1, and a uniform floor."""
    ranks = torch.arange(num_ranks, dtype=torch.float64)
    components = torch.stack([(-ranks / (0.5 * 4**j)).exp() for j in range(len(weights))])
    components /= components.sum(1, keepdim=True)
    return (1 - floor) * torch.tensor(weights, dtype=torch.float64) @ components + floor / num_ranks


def bin_means(values, edges):
    return torch.stack([values[a:b].mean() for a, b in pairwise(edges)])


PLANTED = [0.1, 0.0, 0.5, 0.0, 0.4, 0.0]


def fitted_to(weights, num_ranks=2_000, floor=0.05):
    proposal = RankProposal(num_ranks, floor, decay=0.5)
    edges = proposal.edges.tolist()
    wanted = bin_means(laplace_mixture(weights, num_ranks, floor), edges)
    sizes = torch.tensor(edges).diff()
    for _ in range(1_000):
        proposal.update({"rank_squared": 64 * sizes * wanted**2, "items": torch.tensor(64.0)})
    return proposal


def test_scales_span_the_ranks():
    assert RankProposal(2_000, 0.05, 0.9).scales.tolist() == [0.5, 2, 8, 32, 128, 512]
    assert RankProposal(1, 0.05, 0.9).scales.tolist() == [0.5]


def test_a_planted_laplace_mixture_is_recovered():
    proposal = fitted_to(PLANTED)
    torch.testing.assert_close(proposal.weights, torch.tensor(PLANTED, dtype=torch.float64), rtol=0, atol=0.02)
    planted = laplace_mixture(PLANTED, 2_000, 0.05)
    torch.testing.assert_close(proposal.density(2_000), planted, rtol=0.05, atol=0)


def test_a_signal_that_moves_is_followed():
    proposal = fitted_to(PLANTED)
    shallow = torch.zeros(len(proposal.edges) - 1, dtype=torch.float64)
    shallow[0] = 1.0
    for _ in range(300):
        proposal.update({"rank_squared": shallow, "items": torch.tensor(1.0)})
    assert proposal.weights[0] > 0.95


def test_density_is_a_falling_distribution_whose_last_entry_is_the_mean_of_the_ranks_below():
    weights, num_ranks = [0.3, 0.2, 0.1, 0.1, 0.1, 0.2], 2_000
    proposal = RankProposal(num_ranks, 0.05, 0.9)
    proposal.load_state_dict(proposal.state_dict() | {"rank_weights": torch.tensor(weights, dtype=torch.float64)})
    expected = laplace_mixture(weights, num_ranks, 0.05)
    torch.testing.assert_close(proposal.density(num_ranks), expected)
    for entries in (1, 2, 129):
        density = proposal.density(entries)
        torch.testing.assert_close(density[:-1], expected[: entries - 1])
        torch.testing.assert_close(density[-1], expected[entries - 1 :].mean())
        assert density.sum() + (num_ranks - entries) * density[-1] == pytest.approx(1)
        assert (density.diff() <= 0).all()


def test_without_a_signal_the_weights_stay():
    proposal = RankProposal(500, 0.05, 0.9)
    before = proposal.weights.clone()
    proposal.update({"rank_squared": torch.zeros(len(proposal.edges) - 1).double(), "items": torch.tensor(8.0)})
    torch.testing.assert_close(proposal.weights, before)


@pytest.mark.parametrize("design", ["pps", "replacement"])
def test_the_profile_measured_at_sampled_ranks_is_that_of_all_ranks(design):
    num_items, num_classes, temperature = 1_500, 100, 2.0
    teacher, student = 3 * torch.randn(num_items, num_classes), torch.randn(num_items, num_classes)
    p, s = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    by_rank = (s - p).gather(1, p.argsort(1, descending=True)).double().square().mean(0)
    dis = make_sampler(
        num_classes,
        SamplerSpec(num_sampled_classes=25, num_shared_classes=0, rank_depth=100, proposal_decay=0.8, design=design),
    )
    for _ in range(15):
        sample = dis.sample([TeacherTargets(teacher, temperature, 100)])
        dis.learn(sample, (s - p).gather(1, sample.item_ids))
    ranks = dis.proposal.ranks
    torch.testing.assert_close(
        ranks.profile(), bin_means(by_rank, ranks.edges.tolist()).sqrt(), rtol=0.05, atol=0, check_dtype=False
    )
