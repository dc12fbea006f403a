"""Shared tails: sampled with their probability, and found by items."""

import itertools

import pytest
import torch
from by_definition import capped_slowly, frequencies, generator, within_five_sigma

from hf_dis.sampling.tails import GROUP, ClassDensity, is_outside, largest_densities, sample_tails


def test_the_shared_tail_holds_classes_with_their_probability():
    density = torch.tensor([9.0, 0.1, 0.5, 0.01, 3.0, 0.2, 0.2, 1.0, 0.4, 0.05], dtype=torch.float64)
    expected, seeded, num_trials, num_tails = capped_slowly(density, 4), generator(), 1_500, 3
    sampled = []
    for _ in range(num_trials):
        ids, probability = sample_tails(ClassDensity(density), 4, num_tails, seeded)
        assert (ids.diff() > 0).all()
        torch.testing.assert_close(probability, expected[ids])
        sampled.append(ids)
    for tail in range(num_tails):
        ids = torch.stack([tails[tail] for tails in sampled])
        assert within_five_sigma(frequencies(ids, 10), expected, num_trials)


def test_tails_share_the_classes_that_are_certain_and_differ_in_the_others():
    density = torch.ones(100, dtype=torch.float64)
    density[:2] = 1e3
    ids = sample_tails(ClassDensity(density), 10, 4, generator()).ids
    assert (ids[:, :2] == torch.arange(2)).all()
    assert len(ids[:, 2:].unique()) == 4 * 8


def test_a_tail_as_large_as_all_classes_is_all_classes():
    ids, probability = sample_tails(ClassDensity(torch.rand(7)), 9, 2, generator())
    assert ids.tolist() == [list(range(7))] and (probability == 1).all()


def test_is_outside_is_set_membership():
    for num_shared, num_tails in itertools.product((0, 1, 7, 20), (1, 3)):
        ids, shared = torch.rand(30, 20).argsort(1)[:, :6], torch.rand(num_tails, 20).argsort(1)[:, :num_shared]
        shared = shared.sort(1).values
        expected = [
            [c not in item for c in shared[number % num_tails].tolist()] for number, item in enumerate(ids.tolist())
        ]
        assert is_outside(ids, shared).tolist() == expected


@pytest.mark.parametrize("number", [1, 7, 40])
@pytest.mark.parametrize("num_classes", [40, 80 * GROUP, 80 * GROUP + 13])
def test_the_largest_densities_are_those_of_topk(num_classes, number):
    """With ties, several in one group, and those in no group."""
    density = torch.rand(num_classes, dtype=torch.float64, generator=generator()).mul(50).floor()
    density[-5:] += torch.arange(5) * 20.0
    density[: 4 * (num_classes // GROUP) : max(1, num_classes // GROUP)] += 100
    assert torch.equal(largest_densities(density, number), density.topk(number).values)
