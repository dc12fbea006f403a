"""The costs that head_mode="auto" decides by: scaled from slices of the classes, whatever the clock says."""

import pytest
import torch

from hf_dis import SamplerSpec, cost
from hf_dis.autotune import HeadCosts, measure_costs

LAYOUT = {"num_sampled_classes": 4, "num_shared_classes": 6}


@pytest.fixture
def clock(monkeypatch):
    """Every step is run and takes a millisecond; a list of the steps' names."""
    steps = []

    def one(step, device):
        step()
        steps.append(step.__name__)
        return 1.0

    monkeypatch.setattr(cost, "_milliseconds", one)
    monkeypatch.setattr(cost, "PRODUCT", 200 * cost.ITEMS * 8)  # a slice of 200 classes at d = 8
    monkeypatch.setattr(cost, "RANKED_ELEMENTS", 6_400)
    return steps


def test_all_of_few_classes_are_timed(clock):
    assert measure_costs(50, 8, SamplerSpec(**LAYOUT)) == HeadCosts(exact=1, sampled=1 + 1 + 1)
    assert clock.count("exact") == clock.count("rank") == clock.count("sampled") == clock.count("fill")


def test_many_are_scaled_from_a_slice_of_them(clock):
    """Of 1,600 classes, 200 are computed, and 4 of the 128 items ranked."""
    assert measure_costs(1_600, 8, SamplerSpec(**LAYOUT)) == HeadCosts(exact=8, sampled=1 + 32 + 8)


def test_a_row_sparse_gradient_is_not_filled_with_zeros(clock):
    assert measure_costs(1_600, 8, SamplerSpec(**LAYOUT), row_sparse=True) == HeadCosts(exact=8, sampled=1 + 32)
    assert "fill" not in clock


def test_the_random_numbers_of_the_run_are_left_alone(clock):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    measure_costs(50, 8, SamplerSpec(**LAYOUT))
    assert torch.equal(torch.rand(3), expected)


def test_the_real_clock_gives_positive_times_and_works_without_gradient_mode():
    with torch.no_grad():
        costs = measure_costs(300, 8, SamplerSpec(**LAYOUT))
    assert min(costs) > 0


def test_sampling_has_to_be_clearly_faster():
    assert HeadCosts(1.21, 1.0).sampling_pays and not HeadCosts(1.19, 1.0).sampling_pays
    assert "1.21 ms with all classes" in str(HeadCosts(1.21, 1.0))
