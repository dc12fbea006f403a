"""The proposals: what they are, and that the dynamic ones find what there is to find."""

from itertools import pairwise

import pytest
import torch
from tiny_models import column_ids

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.sampling.class_memory import ClassMemory
from hf_dis.sampling.proposal import DISProposal, Proposal, TeacherProposal, TopKProposal
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


# Ranks

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


def test_disagreement_that_moves_is_followed():
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


def test_without_disagreement_the_weights_stay():
    proposal = RankProposal(500, 0.05, 0.9)
    before = proposal.weights.clone()
    proposal.update({"rank_squared": torch.zeros(len(proposal.edges) - 1).double(), "items": torch.tensor(8.0)})
    torch.testing.assert_close(proposal.weights, before)


@pytest.mark.parametrize("design", ["pps", "replacement"])
def test_the_profile_measured_at_drawn_ranks_is_that_of_all_ranks(sampler):
    num_items, num_classes, temperature = 1_500, 100, 2.0
    teacher, student = 3 * torch.randn(num_items, num_classes), torch.randn(num_items, num_classes)
    p, s = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    by_rank = (s - p).gather(1, p.argsort(1, descending=True)).double().square().mean(0)
    dis = make_sampler(num_classes, SamplerSpec(num_sampled_classes=25, num_shared_classes=0, rank_depth=100, proposal_decay=0.8), sampler=sampler)
    for _ in range(15):
        sample = dis.sample([TeacherTargets(teacher, temperature, 100)])
        dis.learn(sample, (s - p).gather(1, sample.item_ids))
    ranks = dis.proposal.ranks
    torch.testing.assert_close(
        ranks.profile(), bin_means(by_rank, ranks.edges.tolist()).sqrt(), rtol=0.05, atol=0, check_dtype=False
    )


# Classes


def test_the_class_memory_finds_the_classes_that_disagree():
    """Planted: classes 50..59 are where the student is wrong. Known only from sampled classes, after 60 steps."""
    num_classes, temperature = 60, 1.0
    teacher = torch.randn(16, num_classes) * 0.3
    teacher[:, :5] += 5  # every item's head
    student = teacher.clone()
    student[:, 50:] += torch.linspace(2, 4, 10)
    dis = make_sampler(num_classes, SamplerSpec(num_sampled_classes=5, num_shared_classes=12, rank_depth=5))
    for _ in range(60):
        sample = dis.sample([TeacherTargets(teacher, temperature, 5)])
        ids = column_ids(sample)
        dis.learn(sample, sampled_forward_kl(student.gather(1, ids), sample, temperature)[1])
    gap = (student.softmax(1) - teacher.softmax(1)).square().mean(0).sqrt()[5:].double()
    found = dis.proposal.memory.density(floor=0.0, signal_share=1.0)[5:]
    torch.testing.assert_close(found[-10:] / found.sum(), gap[-10:] / gap.sum(), rtol=0.4, atol=0)
    assert found[-10:].min() > found[:-10].max()


def test_the_class_memory_keeps_the_teachers_marginal_outside_the_heads():
    teacher = torch.randn(8, 20)
    p, head = teacher.softmax(1), teacher.topk(3).indices
    expected = p.scatter(1, head, 0).mean(0)
    dis = make_sampler(20, SamplerSpec(num_sampled_classes=3, num_shared_classes=4, rank_depth=3, proposal_decay=0.0))
    sample = dis.sample([TeacherTargets(chunk, 1.0, 3) for chunk in teacher.split(3)])
    dis.learn(sample, torch.zeros_like(sample.log_weights))
    torch.testing.assert_close(dis.proposal.memory.marginal, expected)


def test_the_class_memory_ignores_classes_inside_a_rows_head():
    """Classes that are in every item's head are met by no item as tail: what the memory holds of them stays."""
    teacher = torch.zeros(4, 10)
    teacher[:, :3] = 5
    dis = make_sampler(10, SamplerSpec(num_sampled_classes=3, num_shared_classes=10, rank_depth=3))
    before = dis.proposal.memory.squared_signal.clone()
    sample = dis.sample([TeacherTargets(teacher, 1.0, 3)])
    dis.learn(sample, torch.ones_like(sample.log_weights))
    after = dis.proposal.memory.squared_signal
    assert torch.equal(after[:3], before[:3]) and (after[3:] > 0.2).all()


def test_the_class_density_is_positive_and_sums_to_one():
    memory = ClassMemory(50, 0.9)
    for share in (0.0, 0.5):
        density = memory.density(0.05, share)
        assert density.min() > 0
    memory.marginal.uniform_()
    assert memory.density(0.05).sum() == pytest.approx(1) and memory.density(0.05).min() >= 0.05 / 50


# The proposals by name


def rank_density(proposal, logits, temperature=2.0):
    return proposal.rank_density(TeacherTargets(logits, temperature, 10))


def test_the_teachers_proposal_is_the_teachers_distribution_over_ranks():
    logits = 2 * torch.randn(4, 30)
    density = rank_density(TeacherProposal(30, 30, 10, floor=0.1, decay=0.9), logits)
    p = (logits.double() / 2).softmax(1).sort(1, descending=True).values
    torch.testing.assert_close(density[:, :10], 0.9 * p[:, :10] + 0.1 / 30, rtol=1e-5, atol=0)
    torch.testing.assert_close(density[:, 10], 0.9 * p[:, 10:].mean(1) + 0.1 / 30, rtol=1e-4, atol=0)
    assert (density.diff(dim=1) <= 0).all()


def test_uniform_and_topk_densities():
    logits = torch.randn(4, 30)
    assert rank_density(Proposal(30, 30, 10), logits).tolist() == [1.0] * 11
    assert rank_density(TopKProposal(30, 30, 10, num_sampled=4), logits).tolist() == [1.0] * 4 + [0.0] * 7


@pytest.mark.parametrize("kind", [DISProposal, TeacherProposal])
def test_state_is_all_there_is(kind):
    def learnt(kind, seed):
        proposal = kind(30, 5, 5, floor=0.05, decay=0.9)
        proposal.load_state_dict({name: torch.rand_like(value) for name, value in proposal.state_dict().items()})
        return proposal

    one, other = learnt(kind, 1), kind(30, 5, 5, floor=0.05, decay=0.9)
    other.load_state_dict(one.state_dict())
    assert other.scalars() == one.scalars()
    assert torch.equal(other.class_density(), one.class_density())
    logits = torch.randn(2, 30)
    assert torch.equal(rank_density(other, logits), rank_density(one, logits))
    assert all(value.data_ptr() != one.state_dict()[name].data_ptr() for name, value in other.state_dict().items())
