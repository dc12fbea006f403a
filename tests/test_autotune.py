"""The costs that head_mode="auto" decides by, scaled from slices of the classes; on a made-up clock."""

import pytest
import torch
from fake_cuda import fake_cuda, tensors_of

from hf_dis import ClassSampler, SamplerSpec, autotune, make_sampler
from hf_dis.autotune import HeadCosts, Limits, measure_costs
from hf_dis.loss.exact_head import HeadLoss
from hf_dis.teacher.compact import TargetLayout

LAYOUT = {"num_sampled_classes": 4, "num_shared_classes": 6, "num_tails": 4}


@pytest.fixture
def clock(monkeypatch):
    """Runs each step; it takes a millisecond, the sampled one two, since it ranks too. A list of the names."""
    steps = []

    def one(step, device):
        step()
        steps.append(step.__name__)
        return 2.0 if step.__name__ == "sampled" else 1.0

    monkeypatch.setattr(autotune, "_milliseconds", one)
    limits = Limits(items=256, product=200 * 128 * 8, ranked=6_400)  # a slice of 200 classes at N = 128, d = 8
    monkeypatch.setattr(autotune, "PROCESSOR", limits)
    monkeypatch.setattr(autotune, "ACCELERATOR", limits)
    monkeypatch.setattr(autotune, "SMALLEST_PART", 50)
    return steps


def test_all_of_few_classes_are_timed(clock):
    assert measure_costs(50, 8, SamplerSpec(**LAYOUT)) == HeadCosts(exact=1, sampled=1 + 1 + 1, items=128)
    assert clock.count("exact") == clock.count("rank") == clock.count("sampled") == clock.count("fill")


def test_many_are_scaled_from_a_slice_of_them(clock):
    """Of 1,600 classes, 200 are computed, and 4 of the 128 items ranked."""
    assert measure_costs(1_600, 8, SamplerSpec(**LAYOUT)) == HeadCosts(exact=8, sampled=1 + 32 + 8)


def test_a_row_sparse_gradient_is_not_filled_with_zeros(clock):
    assert measure_costs(1_600, 8, SamplerSpec(**LAYOUT), row_sparse=True) == HeadCosts(exact=8, sampled=1 + 32)
    assert "fill" not in clock


def test_the_items_of_the_run_are_timed_up_to_a_limit(clock):
    """Twice the items: half of the classes, which the sampled step needs no less of, and twice the ranking."""
    costs = measure_costs(1_600, 8, SamplerSpec(**LAYOUT), num_items=256)
    assert costs == HeadCosts(exact=16, sampled=1 + 64 + 1_600 / 112, items=256)
    assert measure_costs(1_600, 8, SamplerSpec(**LAYOUT), num_items=1_000) == costs
    assert "256 items" in str(costs)


def test_stored_targets_are_not_ranked(clock):
    layout = TargetLayout(1_600, 6, 4)
    costs = measure_costs(1_600, 8, SamplerSpec(**LAYOUT), stored=layout)
    assert costs == HeadCosts(exact=8, sampled=2 + 8)
    assert set(clock) == {"exact", "sampled", "fill"}


@pytest.mark.parametrize("stored", [None, TargetLayout(1_600, 6, 4)], ids=["given", "cached"])
def test_the_steps_are_those_of_training_in_chunks_of_the_run(clock, monkeypatch, stored):
    """The teacher answers 32 items at a time, as with all 1,600 classes. Gradients arrive."""
    monkeypatch.setattr("hf_dis.teacher.targets.CHUNK_ELEMENTS", 32 * 1_600)
    sizes, found = [], {}
    add, sample = HeadLoss.add, ClassSampler.sample
    monkeypatch.setattr(HeadLoss, "add", lambda loss, chunk: sizes.append(len(chunk)) or add(loss, chunk))

    def counted(sampler, targets, labels=None):
        targets = list(targets)
        found.setdefault("ranked", [len(chunk) for chunk in targets])
        found.setdefault("first", [int(chunk.ids[0, 0]) for chunk in targets])
        return sample(sampler, targets, labels)

    monkeypatch.setattr(ClassSampler, "sample", counted)
    measure_costs(1_600, 8, SamplerSpec(**LAYOUT), num_items=100, stored=stored)
    assert sizes[:4] == found["ranked"] == [32, 32, 32, 4]
    assert len(set(found["first"])) == 4  # with the same classes in every block fewer rows would be updated


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
        assert sampler.proposal.class_density().values.is_meta


@pytest.mark.parametrize("layout", [LAYOUT, {"num_sampled_classes": 4, "num_shared_classes": 0}])
def test_costs_are_measured_on_an_accelerator(clock, monkeypatch, layout):
    """Every tensor of both steps is there: a mix of devices raises."""
    with fake_cuda():
        costs = measure_costs(1_600, 8, SamplerSpec(**layout), device="cuda")
    assert costs == HeadCosts(exact=8, sampled=1 + 32 + 8)
    assert set(clock) == {"exact", "sampled", "rank", "rank_part", "fill"}
