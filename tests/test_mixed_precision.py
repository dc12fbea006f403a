"""Models in half precision: weights of the sample, losses and what is learnt are float32, and near float64."""

import pytest
import torch

from hf_dis import DISLoss, RowSparseAdamW, SamplerSpec, make_sampler
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import TargetLayout, compact_targets
from hf_dis.teacher.targets import TeacherTargets

N, C, WIDTH = 1024, 120, 8
NARROW = [torch.bfloat16, torch.float16]
SPECS = {
    "shared tails": SamplerSpec(num_sampled_classes=6, num_shared_classes=24, rank_depth=30),
    "updates": SamplerSpec(num_sampled_classes=6, num_shared_classes=24, rank_depth=30, num_updated_classes=1),
    "per item": SamplerSpec(num_sampled_classes=12, num_shared_classes=0),
    "replacement": SamplerSpec(num_sampled_classes=12, num_shared_classes=0, design="replacement"),
}


def logits_of(dtype, seed=3):
    """Logits of a teacher, all of an item different in half precision too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(C, generator=generator) for _ in range(N)]).to(dtype) / 16


def inputs_of(dtype):
    """Features, weight and bias with values of half precision, as leaves of a type."""
    torch.manual_seed(0)
    values = [torch.randn(shape).to(torch.bfloat16).to(torch.float16) / 4 for shape in [(N, WIDTH), (C, WIDTH), (C,)]]
    return [value.to(dtype).requires_grad_() for value in values]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_numbers_of_a_sample_are_float32(spec, dtype):
    sampler = make_sampler(C, spec)
    targets = TeacherTargets(logits_of(dtype), 2.0, sampler.rank_depth)
    sample = sampler.sample([targets], torch.zeros(N, dtype=torch.long))
    names = ("log_weights", "log_probs", "target", "rank_weights", "class_mass")
    assert {getattr(sample, name).dtype for name in names} == {torch.float32}
    torch.testing.assert_close(sample.target.sum(1), torch.ones(N))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_numbers_of_a_stored_sample_are_float32(dtype):
    layout = TargetLayout(C, 10, 12)
    stored = compact_targets(logits_of(dtype), 2.0, layout.depth, layout.sample_size, torch.Generator())
    sample = make_cached_sampler(layout, SamplerSpec(num_shared_classes=24)).sample([CachedTargets(stored, C)])
    names = ("log_weights", "log_probs", "target", "rank_weights", "class_mass")
    assert {getattr(sample, name).dtype for name in names} == {torch.float32}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_entropy_of_stored_targets_is_summed_in_float32(dtype):
    """Each product rounded to bfloat16 would leave an error of 1e-3."""
    logits = logits_of(dtype)
    found = compact_targets(logits, 2.0, 10, 12, torch.Generator()).entropy
    log_probs = (logits.double() / 2).log_softmax(1)
    torch.testing.assert_close(found.double(), -(log_probs.exp() * log_probs).sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("row_sparse", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_narrow_head_is_near_one_in_float64(spec, dtype, row_sparse):
    """1,024 items meet 120 classes: a sum in half precision would stop growing."""
    results = {}
    for kind in (dtype, torch.float64):
        inputs, sampler = inputs_of(kind), make_sampler(C, spec, seed=1)
        dis_loss = DISLoss(sampler, row_sparse_head=row_sparse)
        loss = dis_loss(*inputs, logits_of(dtype), torch.arange(N) % C)
        loss.backward()
        assert all(value.grad.dtype == kind for value in inputs)
        learnt = {name: value for name, value in sampler.proposal.state_dict().items() if value.is_floating_point()}
        assert all(value.dtype in (torch.float32, torch.float64) for value in learnt.values())
        results[kind] = loss.detach().double(), *[value.grad.to_dense().double() for value in inputs], learnt
    (loss, *gradients, learnt), (expected_loss, *expected, expected_learnt) = results.values()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected_loss, rtol=eps, atol=0)
    for found, wanted in zip(gradients, expected, strict=True):
        error = (found - wanted).norm() / wanted.norm()
        assert error <= 2 * eps or (spec.num_updated_classes and error <= 1)  # near an edge another class is kept
    for name, value in expected_learnt.items():
        torch.testing.assert_close(learnt[name], value, rtol=16 * eps, atol=1e-6, msg=name)


def test_a_step_that_grad_scaler_skips_leaves_head_and_proposals():
    """The student's logits overflow in float16: only the teacher's marginal is learnt."""
    sampler = make_sampler(C, SPECS["shared tails"])
    dis_loss, (features, weight, bias) = DISLoss(sampler, row_sparse_head=True), inputs_of(torch.float32)
    optimizer = RowSparseAdamW([weight, bias], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(factor):
        with torch.autocast("cpu", torch.float16):
            loss = dis_loss(factor * features, weight, bias, logits_of(torch.float16))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        state = {**sampler.proposal.state_dict(), "weight": weight, "bias": bias}
        return {name: value.detach().clone() for name, value in state.items()}

    first, before = step(1), step(1)
    assert not any(torch.equal(first[name], before[name]) for name in before if name != "class_marginal")
    after = step(1e7)
    assert scaler.get_scale() == 2.0**9 and int(sampler.not_finite) == N
    for name in before:
        if name == "rank_weights":
            torch.testing.assert_close(after[name].isfinite(), torch.ones_like(after[name], dtype=torch.bool))
        elif name != "class_marginal":
            assert torch.equal(after[name], before[name]), name
