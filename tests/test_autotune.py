"""The costs that head_mode="auto" decides by, scaled from slices of the classes; on a made-up clock."""

import pytest
import torch
from fake_cuda import fake_cuda, tensors_of

from hf_dis import SamplerSpec, autotune, make_sampler
from hf_dis.autotune import HeadCosts, measure_costs

LAYOUT = {"num_sampled_classes": 4, "num_shared_classes": 6}


@pytest.fixture
def clock(monkeypatch):
    """Runs each step; it takes a millisecond, the sampled one two, since it ranks too. A list of the names."""
    steps = []

    def one(step, device):
        step()
        steps.append(step.__name__)
        return 2.0 if step.__name__ == "sampled" else 1.0

    monkeypatch.setattr(autotune, "_milliseconds", one)
    monkeypatch.setattr(autotune, "PRODUCT", 200 * autotune.ITEMS * 8)  # a slice of 200 classes at d = 8
    monkeypatch.setattr(autotune, "RANKED_ELEMENTS", 6_400)
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


# Accelerators


@pytest.mark.parametrize("proposal", ["dis", "teacher", "uniform", "topk"])
def test_a_sampler_is_on_its_device(proposal):
    """The generator apart, whose numbers are the same on every device."""
    sampler = make_sampler(300, SamplerSpec(**LAYOUT, proposal=proposal), device="meta")
    parts = [
        sampler,
        sampler.proposal,
        *(vars(sampler.proposal)[name] for name in ("ranks", "memory") if proposal == "dis"),
    ]
    found = tensors_of([list(vars(part).values()) for part in parts])
    assert found and all(tensor.is_meta for tensor in found)
    if proposal != "topk":
        assert sampler.proposal.class_density().is_meta


@pytest.mark.parametrize("layout", [LAYOUT, {"num_sampled_classes": 4, "num_shared_classes": 0}])
def test_costs_are_measured_on_an_accelerator(clock, monkeypatch, layout):
    """Every tensor of both steps is there: a mix of devices raises."""
    monkeypatch.setattr(autotune, "ACCELERATOR_PRODUCT", autotune.PRODUCT)
    with fake_cuda():
        costs = measure_costs(1_600, 8, SamplerSpec(**layout), device="cuda")
    assert costs == HeadCosts(exact=8, sampled=1 + 32 + 8)
    assert set(clock) == {"exact", "sampled", "rank", "rank_part", "fill"}
