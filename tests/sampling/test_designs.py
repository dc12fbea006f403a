"""Inclusion probabilities, the designs, updates of the head, ranks and classes."""

import pytest
import torch
from by_definition import capped_slowly, frequencies, generator, within_five_sigma
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dis.sampling.designs import Updates, inclusion_probabilities, ranks_to_classes, sample_ranks

# The classes that update the head


def kept_by(updates, sizes):
    """The places that are kept, and their weights; entries that stand for no class change nothing."""
    weights = updates.weights(sizes)
    padded, count = torch.cat([sizes, torch.zeros(3)]), torch.tensor([len(sizes)])
    of_padded, of_none = updates.weights(padded, count).split([len(sizes), 3])
    torch.testing.assert_close(of_padded, weights, equal_nan=True)
    assert not of_none.any() or not weights.isfinite().all()
    places = weights.nonzero()[:, 0]
    return places, weights[places]


def test_updates_are_kept_with_their_probability_and_weighted_by_its_inverse():
    """One place is certain, two cannot be met, and none is there twice."""
    sizes = torch.tensor([0.5, 30.0, 0.0, 1.0, 2.0, 0.25, 0.0, 1.5])
    inclusion = capped_slowly(sizes.double(), 3)
    assert inclusion[1] == 1 and (inclusion[[2, 6]] == 0).all()
    kept = []
    for start in torch.rand(4000, dtype=torch.float64, generator=generator()).tolist():
        places, weights = kept_by(Updates(3, start), sizes)
        assert len(places) == 3 and (places.diff() > 0).all()
        torch.testing.assert_close(weights, inclusion[places].reciprocal().float())
        kept.append(places)
    assert within_five_sigma(frequencies(torch.stack(kept), len(sizes)), inclusion, len(kept))


@pytest.mark.parametrize("sizes", [torch.ones(5), torch.zeros(5), torch.tensor([1.0, 0, 0, 0, 1e-30])])
def test_as_many_updates_as_there_are_is_all_of_them(sizes):
    places, weights = kept_by(Updates(5, 0.7), sizes)
    assert places.tolist() == [0, 1, 2, 3, 4] and weights.tolist() == [1] * 5


@pytest.mark.parametrize("sizes", [torch.ones(6), torch.zeros(6), torch.tensor([0.0, 1, 0, 0, 0, 1e-30])])
def test_updates_of_equal_or_vanishing_sizes(sizes):
    places, weights = kept_by(Updates(5, 0.7), sizes)
    assert len(places) <= 5 and weights.isfinite().all()
    assert len(places) == 5 or sizes.max() > sizes.min()


def test_updates_stay_unbiased_where_more_are_to_be_capped_than_there_are_steps():
    sizes = 8.0 ** -torch.arange(16)
    total = torch.zeros(16)
    for start in torch.rand(4000, dtype=torch.float64, generator=generator()).tolist():
        places, weights = kept_by(Updates(12, start), sizes)
        assert len(places) <= 12 and (weights >= 1).all()
        total[places] += weights
    assert (total[:6] == 4000).all() and ((total / 4000)[6:9] - 1).abs().max() < 0.2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_overflow_stays_one(bad):
    """A gradient scaler looks for it in what is kept."""
    for place in range(4):
        sizes = torch.ones(4)
        sizes[place] = bad
        assert not kept_by(Updates(2, 0.5), sizes)[1].isfinite().all()


# Inclusion probabilities


@settings(max_examples=50, deadline=None)
@given(
    density=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30),
    last_size=st.integers(1, 20),
    num_sampled=st.integers(1, 60),
)
def test_inclusion_probabilities_are_those_of_iterated_capping(density, last_size, num_sampled):
    density = torch.tensor(sorted(density, reverse=True), dtype=torch.float64)
    expanded = torch.cat([density[:-1], density[-1:].expand(last_size)])
    found = inclusion_probabilities(density, num_sampled, last_size)
    found = torch.cat([found[:-1], found[-1:].expand(last_size)])
    assert ((found >= 0) & (found <= 1)).all()
    assert found.sum() == pytest.approx(min(num_sampled, len(expanded)))
    if num_sampled >= len(expanded):
        assert (found == 1).all()
    else:
        expected = capped_slowly(expanded, num_sampled)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
        assert (found[expected == 1] == 1).all()


def test_inclusion_probabilities_of_many_items_and_of_a_truncation():
    densities = (torch.rand(5, 12, dtype=torch.float64) ** 4).sort(1, descending=True).values
    items = torch.stack([inclusion_probabilities(item, 4, 3) for item in densities])
    assert torch.equal(inclusion_probabilities(densities, 4, 3), items)
    # A few entries that hold all of the mass but a rounding error.
    steep = 10.0 ** -torch.arange(0, 300, 30, dtype=torch.float64)
    torch.testing.assert_close(inclusion_probabilities(steep, 4), capped_slowly(steep, 4), rtol=1e-12, atol=0)
    truncated = (torch.arange(10) < 3).double()
    assert torch.equal(inclusion_probabilities(truncated, 3), truncated)


# Designs


@pytest.mark.parametrize("depth", [12, 40], ids=["ranks below 12 unresolved", "all resolved"])
@pytest.mark.parametrize("design", ["pps", "replacement"])
def test_ranks_are_sampled_with_their_probability_and_weighted_by_its_inverse(design, depth):
    """40 ranks, 6 samples, three different items; an unresolved last entry stands for the mean of its ranks."""
    num_items, num_ranks, num_sampled = 30_000, 40, 6
    decay = torch.tensor([0.3, 0.05, 0.01], dtype=torch.float64)[:, None]
    every_rank = (-decay * torch.arange(num_ranks)).exp() + 0.02
    every_rank[:, depth - 1 :] = every_rank[:, depth - 1 :].mean(1, keepdim=True)
    density = every_rank[:, :depth].repeat(num_items // 3, 1)
    ranks, log_weights, certain = sample_ranks(density, num_ranks, num_items, num_sampled, design, generator())
    for item in range(3):
        sampled, weights = ranks[item::3], log_weights[item::3].double().exp()
        q = every_rank[item] / every_rank[item].sum()
        expected = capped_slowly(q, num_sampled) if design == "pps" else num_sampled * q
        torch.testing.assert_close(weights, 1 / expected[sampled], rtol=1e-6, atol=0)
        # The count of a rank has at most binomial variance: sampled once or not at all, or in K independent samples.
        trials, observed = len(sampled), frequencies(sampled, num_ranks)
        if design == "replacement":
            trials, observed, expected = trials * num_sampled, observed / num_sampled, q
        assert within_five_sigma(observed, expected, trials)
        assert torch.equal(certain[item::3], expected[sampled] == 1)
    if design == "pps":
        assert (ranks.sort(1).values.diff(dim=1) > 0).all(), "a rank was sampled twice in an item"
        assert certain.any()


def test_items_are_sampled_independently_of_each_other():
    ranks, _, _ = sample_ranks(torch.ones(50), 50, 4_000, 5, "pps", generator())
    alike = (ranks[0::2] == ranks[1::2]).all(1).double().mean()
    assert alike == pytest.approx(1 / 10, abs=0.03)  # a systematic sample of 5 from 50 equal ranks has 10 outcomes


# Ranks and classes


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_ranks_stand_for_every_class_once(depth):
    ranked = torch.rand(50, 12).argsort(1)[:, :depth]
    classes = ranks_to_classes(torch.arange(12).expand(50, -1), ranked)
    assert torch.equal(classes[:, :depth], ranked)
    assert torch.equal(classes.sort(1).values, torch.arange(12).expand(50, -1))
    shuffled = torch.rand(50, 12).argsort(1)
    assert torch.equal(ranks_to_classes(shuffled, ranked), classes.gather(1, shuffled))
