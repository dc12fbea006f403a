"""Devices without float64: no tensor of that type is made there, and results are those of float64 to rounding."""

import logging
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import fake_cuda, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.head.check import check_row_sparse_head
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.precision import _tell, widest
from hf_dis.report.diagnostics import RunningMeans, sample_quality
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import TargetLayout, compact_targets
from hf_dis.teacher.targets import TeacherTargets

N, C, WIDTH = 64, 300, 8
SPECS = {
    "shared tails": SamplerSpec(num_sampled_classes=8, num_shared_classes=32, num_updated_classes=2),
    "per item": SamplerSpec(num_sampled_classes=8, num_shared_classes=0),
    "replacement": SamplerSpec(num_sampled_classes=8, num_shared_classes=0, design="replacement"),
    "teacher": SamplerSpec(num_sampled_classes=8, num_shared_classes=32, proposal="teacher"),
    "uniform": SamplerSpec(num_sampled_classes=8, num_shared_classes=32, proposal="uniform"),
    "top-K": SamplerSpec(num_sampled_classes=8, proposal="topk"),
}
STORED = {
    "shared tails": SamplerSpec(num_sampled_classes=4, num_shared_classes=32),
    "per item": SamplerSpec(num_sampled_classes=8, num_shared_classes=0),
}


@pytest.fixture
def without_float64(monkeypatch):
    """Takes the type of a device, which then has no float64."""
    return lambda device: monkeypatch.setattr("hf_dis.precision.WITHOUT_FLOAT64", {device})


class OnDevice(TorchDispatchMode):
    """Collects the operations that make a tensor of float64 on an accelerator."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(one.is_cuda and one.dtype == torch.float64 for one in tensors_of(result)):
            self.found.add(function.name())
        return result


def stored_targets(device):
    layout, generator = TargetLayout(C, 10, 12), torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(N, C, device=device)
    return layout, CachedTargets(compact_targets(logits, 2.0, layout.depth, layout.sample_size, generator), C)


def step_from_cache(spec, device):
    layout, targets = stored_targets(device)
    sampler = make_cached_sampler(layout, spec, device=device)
    sample = sampler.sample([targets], torch.zeros(N, dtype=torch.long, device=device))
    sampler.learn(sample, sampled_forward_kl(torch.zeros_like(sample.log_weights), sample, 2.0).signal)
    sampler.proposal.class_density()
    return sampler


def means_of(values):
    means = RunningMeans()
    for _ in range(2):
        means.add(values, counts=torch.ones_like(next(iter(values.values()))))
    return means.pop()


def test_only_mps_has_no_float64():
    assert [widest(device) for device in ("cpu", torch.device("cuda", 1), "mps")] == [
        torch.float64,
        torch.float64,
        torch.float32,
    ]


@pytest.mark.parametrize("lacks_it", [True, False], ids=["without float64", "with float64"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_step_makes_no_float64_on_the_device(spec, lacks_it, without_float64):
    """On a device with float64 the same step makes some: the measurement sees them."""
    if lacks_it:
        without_float64("cuda")
    with fake_cuda(), OnDevice() as device:
        dis_loss = DISLoss(make_sampler(C, spec, device="cuda"), row_sparse_head=True)
        dis_loss._has_checked_values = True  # a later batch: values are made up here
        head = [torch.empty(size, WIDTH, device="cuda", requires_grad=True) for size in (N, C)]
        labels = torch.zeros(N, dtype=torch.long, device="cuda")
        dis_loss(*head, None, torch.empty(N, C, device="cuda"), labels).backward()
        dis_loss.sampler.proposal.class_density()
    assert bool(device.found) != lacks_it, device.found


@pytest.mark.parametrize("spec", STORED.values(), ids=STORED)
def test_a_step_from_a_cache_makes_no_float64_on_the_device(spec, without_float64):
    without_float64("cuda")
    with fake_cuda(), OnDevice() as device:
        step_from_cache(spec, "cuda")
    assert not device.found


def test_running_means_make_no_float64_on_the_device(without_float64):
    without_float64("cuda")
    with fake_cuda(), OnDevice() as device:
        means_of({"loss": torch.empty(N, device="cuda")})
    assert not device.found


def losses_of(spec):
    """Losses and qualities of some steps, and what was learnt."""
    generator = torch.Generator().manual_seed(1)
    sampler = make_sampler(C, spec)
    losses, values = [], []
    for _ in range(4):
        teacher, logits = (2 * torch.randn(N, C, generator=generator) for _ in range(2))
        sample = sampler.sample([TeacherTargets(teacher, 2.0, sampler.rank_depth)])
        ids = torch.cat([sample.item_ids, sample.tail_ids[torch.arange(N) % len(sample.tail_ids)]], 1)
        result = sampled_forward_kl(logits.gather(1, ids), sample, 2.0)
        sampler.learn(sample, result.signal)
        losses.append(result.loss)
        values.append(means_of(sample_quality(sample, result)))
    return torch.stack(losses), values, sampler.proposal.state_dict()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_results_are_those_of_float64(spec, without_float64):
    losses, values, learnt = losses_of(spec)
    without_float64("cpu")
    found, found_values, found_learnt = losses_of(spec)
    assert all(value.dtype != torch.float64 for value in found_learnt.values())
    # The same random numbers: only a point next to the edge of two classes falls on the other.
    same = (found - losses).abs() <= 1e-4 * losses.abs().clamp_min(1)
    assert same.double().mean() > 0.95
    for one, other in zip(found_values, values, strict=True):
        assert one == pytest.approx(other, rel=1e-2)
    for name, value in learnt.items():
        torch.testing.assert_close(found_learnt[name].double(), value.double(), rtol=2e-2, atol=1e-6, msg=name)


def test_results_from_a_cache_are_those_of_float64(without_float64):
    torch.manual_seed(2)
    expected = step_from_cache(STORED["shared tails"], "cpu").proposal.state_dict()
    without_float64("cpu")
    torch.manual_seed(2)
    found = step_from_cache(STORED["shared tails"], "cpu").proposal.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_a_device_without_float64_is_told_once(without_float64, caplog):
    _tell.cache_clear()
    without_float64("cuda")
    with caplog.at_level(logging.INFO, "hf_dis.precision"):
        assert widest("cuda") == widest("cuda:1") == torch.float32 and widest("cpu") == torch.float64
    assert [record.message for record in caplog.records] == [
        "cuda has no float64: samplers and running means compute in float32 there"
    ]


@pytest.mark.parametrize("has_it", [True, False])
def test_a_device_of_intel_is_asked(has_it, monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_it))
    assert widest("xpu") == (torch.float64 if has_it else torch.float32)


# Devices without sparse tensors


@pytest.fixture
def without_sparse(monkeypatch):
    """Takes sparse tensors from the processor."""

    def refuse(*args, **kwargs):
        raise NotImplementedError("Could not run 'aten::_sparse_coo_tensor_with_dims_and_tensors'")

    monkeypatch.setattr("hf_dis.precision.WITH_SPARSE", set())
    monkeypatch.setattr(torch, "sparse_coo_tensor", refuse)


def test_what_needs_sparse_tensors_is_refused_where_there_are_none(without_sparse):
    shared = SamplerSpec(num_sampled_classes=8, num_shared_classes=32)
    refused = r"num_shared_classes is 32 .*torch has none for cpu: set num_shared_classes=0, or proposal='uniform'"
    for make in (lambda: make_sampler(C, shared), lambda: make_cached_sampler(TargetLayout(C, 10, 12), shared)):
        with pytest.raises(ValueError, match=refused):
            make()
    with pytest.raises(ValueError, match=r"row_sparse_head is set.* none for cpu: set row_sparse_head=False"):
        check_row_sparse_head(torch.nn.Sequential(torch.nn.Linear(2, 3)), ["0"], is_sharded=False)


@pytest.mark.parametrize("spec", [SPECS["per item"], SPECS["uniform"]], ids=["per item", "uniform"])
def test_what_needs_none_works_without_sparse_tensors(spec, without_sparse):
    losses, _, _ = losses_of(spec)
    assert losses.isfinite().all()


def test_a_trial_finds_sparse_tensors(monkeypatch):
    monkeypatch.setattr("hf_dis.precision.WITH_SPARSE", set())
    make_sampler(C, SPECS["shared tails"])
