"""A class mass sampled at a fixed number of points: unbiased, and nearly as good for the proposal as the whole one."""

import pytest
import torch

from hf_dis.sampling.class_memory import MASS_POINTS, ClassMemory, sampled_mass

C = 50_000


def masses(steps):
    """The teacher's mass of each class in a step of 32 items: the marginal falls as 1 / rank, and items differ."""
    generator = torch.Generator().manual_seed(0)
    marginal = 1 / torch.arange(1, C + 1)[torch.randperm(C, generator=generator)]
    for _ in range(steps):
        logits = marginal.log() + 2 * torch.randn(32, C, generator=generator)
        yield logits.softmax(1).sum(0)


def test_each_class_has_its_mass_on_average():
    mass, generator = next(masses(1)), torch.Generator().manual_seed(1)
    samples = [sampled_mass(mass, generator) for _ in range(200)]
    assert all(sample.is_sparse and len(sample._values()) == MASS_POINTS for sample in samples)
    share = mass.sum() / MASS_POINTS
    first = samples[0].to_dense()
    assert float((first - mass).abs().max()) <= 1.001 * share
    mean = sum(sample.to_dense() for sample in samples) / len(samples)
    assert float((mean - mass).abs().max()) < 0.25 * share  # five standard deviations: share / 2 / 200 ** 0.5
    torch.testing.assert_close(mean.sum(), mass.sum())


def test_a_small_mass_is_sent_as_it_is():
    mass, generator = torch.rand(3 * MASS_POINTS), torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert sampled_mass(mass, generator) is mass and torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("signal_share", "most"), [(0.5, 1.01), (0.0, 1.15)], ids=["dis", "teacher"])
def test_a_proposal_from_samples_is_nearly_as_good(signal_share, most):
    """The variance of a sum over the tail, Σ p² / q, for the marginal p of later steps."""
    whole, sampled = ClassMemory(C, 0.95), ClassMemory(C, 0.95)
    generator, counts = torch.Generator().manual_seed(1), {"items": torch.tensor(32), "not_finite": torch.tensor(0)}
    tail = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 2), (C, 2))
    steps = list(masses(110))
    for mass in steps[:60]:
        whole.update({"tail": tail, "class_mass": mass, **counts})
        sampled.update({"tail": tail, "class_mass": sampled_mass(mass, generator), **counts})
    later = sum(steps[60:]).double()
    variance = [float((later.square() / one.density(0.05, signal_share).values).sum()) for one in (whole, sampled)]
    assert variance[0] < variance[1] < most * variance[0]


@pytest.mark.parametrize("entries", [400, 0])
@pytest.mark.parametrize("num_classes", [50, 50_000])
def test_a_sparse_mass_is_sampled_as_the_dense_one(num_classes, entries):
    """With a class that has several entries, and most classes without one; a process without items has none."""
    ids = torch.randint(num_classes, (entries,), generator=torch.Generator().manual_seed(1))
    values = torch.randint(1, 9, (entries,), generator=torch.Generator().manual_seed(2)) / 8  # sums are exact
    sparse = torch.sparse_coo_tensor(ids[None], values, (num_classes,), check_invariants=False)
    found, expected = (
        sampled_mass(mass, torch.Generator().manual_seed(3)).to_dense() for mass in (sparse, sparse.to_dense())
    )
    assert torch.equal(found, expected) and (found.sum() > 0) == (entries > 0)
