"""The densities of the proposals by name, and their state."""

import pytest
import torch

from hf_dis.sampling.proposal import DISProposal, Proposal, TeacherProposal, TopKProposal
from hf_dis.teacher.targets import TeacherTargets


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
    assert torch.equal(other.class_density().values, one.class_density().values)
    logits = torch.randn(2, 30)
    assert torch.equal(rank_density(other, logits), rank_density(one, logits))
    assert all(value.data_ptr() != one.state_dict()[name].data_ptr() for name, value in other.state_dict().items())
