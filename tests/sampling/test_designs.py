"""Inclusion probabilities, sampling by them, ranks and classes, and the target of a stratum."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dis.sampling.designs import Updates, inclusion_probabilities, ranks_to_classes, sample_ranks
from hf_dis.sampling.sample import Stratum
from hf_dis.sampling.tails import is_member, sample_tails


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def capped_slowly(density, num_sampled):
    """π by definition: scale to K, fix whatever exceeds one at one, scale the rest again, until nothing does."""
    capped = torch.zeros_like(density, dtype=torch.bool)
    while True:
        kappa = (num_sampled - capped.sum()) / density[~capped].sum()
        exceeding = ~capped & (kappa * density > 1)
        if not exceeding.any():
            return torch.where(capped, 1.0, kappa * density)
        capped |= exceeding


def frequencies(sampled, num_values):
    return torch.bincount(sampled.flatten(), minlength=num_values).double() / len(sampled)


def within_five_sigma(observed, expected, num_trials):
    sigma = (expected * (1 - expected) / num_trials).clamp_min(0).sqrt()
    return bool(((observed - expected).abs() <= 5 * sigma + 1e-12).all())


# Which of what was sampled updates the head


def test_updates_are_kept_with_their_probability_and_weighted_by_its_inverse():
    """One place is certain, two cannot be met, and none is there twice."""
    sizes = torch.tensor([0.5, 30.0, 0.0, 1.0, 2.0, 0.25, 0.0, 1.5])
    inclusion = capped_slowly(sizes.double(), 3)
    assert inclusion[1] == 1 and (inclusion[[2, 6]] == 0).all()
    kept = []
    for start in torch.rand(4000, dtype=torch.float64, generator=generator()).tolist():
        places, weights = Updates(3, start).sample(sizes)
        assert len(places) == 3 and (places.diff() > 0).all()
        torch.testing.assert_close(weights, inclusion[places].reciprocal().float())
        kept.append(places)
    assert within_five_sigma(frequencies(torch.stack(kept), len(sizes)), inclusion, len(kept))


@pytest.mark.parametrize("sizes", [torch.ones(5), torch.zeros(5), torch.tensor([1.0, 0, 0, 0, 1e-30])])
def test_as_many_updates_as_there_are_is_all_of_them(sizes):
    places, weights = Updates(5, 0.7).sample(sizes)
    assert places.tolist() == [0, 1, 2, 3, 4] and weights.tolist() == [1] * 5


@pytest.mark.parametrize("sizes", [torch.ones(6), torch.zeros(6), torch.tensor([0.0, 1, 0, 0, 0, 1e-30])])
def test_updates_of_equal_or_vanishing_sizes(sizes):
    places, weights = Updates(5, 0.7).sample(sizes)
    assert len(places) <= 5 and weights.isfinite().all()
    assert len(places) == 5 or sizes.max() > sizes.min()


def test_updates_stay_unbiased_where_more_are_to_be_capped_than_there_are_steps():
    sizes = 8.0 ** -torch.arange(16)
    total = torch.zeros(16)
    for start in torch.rand(4000, dtype=torch.float64, generator=generator()).tolist():
        places, weights = Updates(12, start).sample(sizes)
        assert len(places) <= 12 and (weights >= 1).all()
        total[places] += weights
    assert (total[:6] == 4000).all() and ((total / 4000)[6:9] - 1).abs().max() < 0.2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_overflow_stays_one(bad):
    """A gradient scaler looks for it in what is kept."""
    for place in range(4):
        sizes = torch.ones(4)
        sizes[place] = bad
        assert not Updates(2, 0.5).sample(sizes)[1].isfinite().all()


# Inclusion probabilities


@settings(max_examples=50, deadline=None)
@given(
    density=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30),
    last_size=st.integers(1, 20),
    num_sampled=st.integers(1, 60),
)
def test_inclusion_probabilities_are_those_of_iterated_capping(density, last_size, num_sampled):
    density = torch.tensor(density, dtype=torch.float64)
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


def test_inclusion_probabilities_of_many_rows_and_of_a_truncation():
    densities = torch.rand(5, 12, dtype=torch.float64) ** 4
    items = torch.stack([inclusion_probabilities(item, 4, 3) for item in densities])
    assert torch.equal(inclusion_probabilities(densities, 4, 3), items)
    truncated = (torch.arange(10) < 3).double()
    assert torch.equal(inclusion_probabilities(truncated, 3), truncated)


# Samplers


@pytest.mark.parametrize("depth", [12, 40], ids=["ranks below 12 unresolved", "all resolved"])
@pytest.mark.parametrize("design", ["pps", "replacement"])
def test_ranks_are_drawn_with_their_probability_and_weighted_by_its_inverse(sampler, depth):
    """40 ranks, 6 samples, three different items; an unresolved last entry stands for the mean of its ranks."""
    num_items, num_ranks, num_sampled = 30_000, 40, 6
    decay = torch.tensor([0.3, 0.05, 0.01], dtype=torch.float64)[:, None]
    every_rank = (-decay * torch.arange(num_ranks)).exp() + 0.02
    every_rank[:, depth - 1 :] = every_rank[:, depth - 1 :].mean(1, keepdim=True)
    density = every_rank[:, :depth].repeat(num_items // 3, 1)
    ranks, log_weights, certain = sample_ranks(density, num_ranks, num_items, num_sampled, sampler, generator())
    for item in range(3):
        sampled, weights = ranks[item::3], log_weights[item::3].double().exp()
        q = every_rank[item] / every_rank[item].sum()
        expected = capped_slowly(q, num_sampled) if sampler == "pps" else num_sampled * q
        torch.testing.assert_close(weights, 1 / expected[sampled], rtol=1e-6, atol=0)
        # The count of a rank has at most binomial variance: sampled once or not at all, or in K independent samples.
        trials, observed = len(sampled), frequencies(sampled, num_ranks)
        if sampler == "replacement":
            trials, observed, expected = trials * num_sampled, observed / num_sampled, q
        assert within_five_sigma(observed, expected, trials)
        assert torch.equal(certain[item::3], expected[sampled] == 1)
    if sampler == "pps":
        assert (ranks.sort(1).values.diff(dim=1) > 0).all(), "a rank was sampled twice in an item"
        assert certain.any()


def test_rows_draw_independently_of_each_other():
    ranks, _, _ = sample_ranks(torch.ones(50), 50, 4_000, 5, "pps", generator())
    alike = (ranks[0::2] == ranks[1::2]).all(1).double().mean()
    assert alike == pytest.approx(1 / 10, abs=0.03)  # a systematic sample of 5 from 50 equal ranks has 10 outcomes


def test_the_shared_tail_holds_classes_with_their_probability():
    density = torch.tensor([9.0, 0.1, 0.5, 0.01, 3.0, 0.2, 0.2, 1.0, 0.4, 0.05], dtype=torch.float64)
    expected, seeded, num_trials, num_tails = capped_slowly(density, 4), generator(), 1_500, 3
    sampled = []
    for _ in range(num_trials):
        ids, probability = sample_tails(density, 4, num_tails, seeded)
        assert (ids.diff() > 0).all()
        torch.testing.assert_close(probability, expected[ids])
        sampled.append(ids)
    for tail in range(num_tails):
        ids = torch.stack([tails[tail] for tails in sampled])
        assert within_five_sigma(frequencies(ids, 10), expected, num_trials)


def test_tails_share_the_classes_that_are_certain_and_differ_in_the_others():
    density = torch.ones(100, dtype=torch.float64)
    density[:2] = 1e3
    ids = sample_tails(density, 10, 4, generator()).ids
    assert (ids[:, :2] == torch.arange(2)).all()
    assert len(ids[:, 2:].unique()) == 4 * 8


def test_a_tail_as_large_as_all_classes_is_all_classes():
    ids, probability = sample_tails(torch.rand(7), 9, 2, generator())
    assert ids.tolist() == [list(range(7))] and (probability == 1).all()


# Ranks, classes, membership


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_ranks_stand_for_every_class_once(depth):
    ranked = torch.rand(50, 12).argsort(1)[:, :depth]
    classes = ranks_to_classes(torch.arange(12).expand(50, -1), ranked)
    assert torch.equal(classes[:, :depth], ranked)
    assert torch.equal(classes.sort(1).values, torch.arange(12).expand(50, -1))
    shuffled = torch.rand(50, 12).argsort(1)
    assert torch.equal(ranks_to_classes(shuffled, ranked), classes.gather(1, shuffled))


def test_is_member_is_set_membership():
    for num_shared, num_tails in itertools.product((0, 1, 7, 20), (1, 3)):
        ids, shared = torch.rand(30, 20).argsort(1)[:, :6], torch.rand(num_tails, 20).argsort(1)[:, :num_shared]
        shared = shared.sort(1).values
        expected = [
            [c in item for c in shared[number % num_tails].tolist()] for number, item in enumerate(ids.tolist())
        ]
        assert is_member(ids, shared).tolist() == expected
        assert is_member(ids[7:], shared, first_item=7).tolist() == expected[7:]


# A stratum


def stratum():
    """Four classes of a stratum of mass 0.8: the first certain, the last not used."""
    log_probs = torch.tensor([[0.4, 0.2, 0.1, 0.05]], dtype=torch.float64).log()
    log_weights = torch.tensor([[1.0, 2.0, 4.0, 0.0]], dtype=torch.float64).log()
    certain = torch.tensor([[True, False, False, False]])
    return Stratum(torch.tensor([[7, 5, 3, 1]]), log_weights, certain, log_probs, torch.tensor([0.8]).double())


def test_the_target_keeps_certain_classes_and_sums_to_the_mass():
    torch.testing.assert_close(stratum().target(), torch.tensor([[0.4, 0.2, 0.2, 0.0]], dtype=torch.float64))


def test_mass_that_nothing_drawn_could_carry_is_left_out():
    certain = stratum()._replace(certain=torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(certain.target(), torch.tensor([[0.4, 0.2, 0.1, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("label", "held", "expected"),
    [
        (7, True, [0.0, 0.2, 0.2, 0.0]),  # certain: its own mass goes
        (5, True, [0.4, 0.0, 0.2, 0.0]),  # random: the other takes what is left
        (9, True, [0.4, 0.1, 0.1, 0.0]),  # not sampled here, but of this stratum
        (9, False, [0.4, 0.2, 0.2, 0.0]),  # of another stratum
    ],
)
def test_a_stratum_gives_way_to_the_label(label, held, expected):
    """0.4 for class 7, 0.2 for any other."""
    mass = torch.tensor([0.4 if label == 7 else 0.2], dtype=torch.float64)
    own = Stratum(
        torch.tensor([[label]]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), mass[:, None].log(), mass
    )
    found = stratum().without(own, torch.tensor([held])).target()
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))
