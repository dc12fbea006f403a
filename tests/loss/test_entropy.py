"""The entropy from sampled classes against the entropy by its definition."""

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.head.sampled_linear import sampled_columns
from hf_dis.loss.entropy import sampled_entropy
from hf_dis.teacher.targets import TeacherTargets

CLASSES, ITEMS = 2000, 32


def entropy(logits):
    """From the definition, float64."""
    s = logits.double().exp()
    s = s / s.sum(1, keepdim=True)
    return -(s * s.log()).sum(1)


def models(noise=0.5):
    """A student whose logits are those of its teacher and some noise."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(ITEMS, CLASSES, generator=generator) * 3
    return teacher + noise * torch.randn(ITEMS, CLASSES, generator=generator), teacher


def sampled(student, teacher, spec, seed):
    """The student's logits of the sampled classes, and their log-weights."""
    sampler = make_sampler(CLASSES, spec, seed=seed)
    sample = sampler.sample([TeacherTargets(teacher, 2.0, sampler.rank_depth)])
    return sampled_columns(student, sample.item_ids, sample.tail_ids), sample.log_weights


def estimates(student, teacher, spec, number):
    """Of as many samples, ``[number, N]``."""
    found = [sampled_entropy(*sampled(student, teacher, spec, seed)) for seed in range(number)]
    return torch.stack(found).double()


def test_all_classes_give_the_entropy():
    logits = torch.randn(5, 30, dtype=torch.float64) * 4
    found = sampled_entropy(logits, torch.zeros_like(logits))
    torch.testing.assert_close(found, entropy(logits), rtol=0, atol=1e-12)


def test_a_constant_per_item_has_no_effect():
    logits, log_weights = torch.randn(5, 30).double(), torch.rand(5, 30).double()
    moved = sampled_entropy(logits + 7 * torch.randn(5, 1), log_weights)
    torch.testing.assert_close(moved, sampled_entropy(logits, log_weights))


def test_unused_columns_and_masked_classes_count_as_none():
    logits, log_weights = torch.randn(5, 30), torch.zeros(5, 30)
    more = torch.cat([logits, torch.full((5, 1), 3.0), torch.full((5, 1), -torch.inf)], 1)
    weights = torch.cat([log_weights, torch.full((5, 1), -torch.inf), torch.zeros(5, 1)], 1)
    torch.testing.assert_close(sampled_entropy(more, weights), sampled_entropy(logits, log_weights))


def test_bfloat16_is_computed_in_float32():
    logits = torch.randn(5, 30, dtype=torch.bfloat16)
    found = sampled_entropy(logits, torch.zeros(5, 30))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), entropy(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        SamplerSpec(num_sampled_classes=32, num_shared_classes=256, num_tails=2),
        SamplerSpec(num_sampled_classes=128, num_shared_classes=0),
        SamplerSpec(num_sampled_classes=256, num_shared_classes=0, design="replacement"),
    ],
    ids=["shared tails", "per item", "replacement"],
)
def test_the_mean_of_many_samples_is_near_the_entropy(spec):
    student, teacher = models()
    expected = entropy(student)  # 3.8 nats on average
    error = estimates(student, teacher, spec, 40).mean(0) - expected
    assert error.mean().abs() < 0.02 and error.abs().max() < 0.2, error
    logits, log_weights = sampled(student, teacher, spec, seed=0)
    without_weights = sampled_entropy(logits, log_weights.clamp(max=0)) - expected
    assert without_weights.mean() < -0.5


def test_larger_samples_are_nearer():
    student, teacher = models()
    errors = []
    for size in (16, 64, 256):
        spec = SamplerSpec(num_sampled_classes=size, num_shared_classes=0)
        error = estimates(student, teacher, spec, 10) - entropy(student)
        errors.append(float(error.square().mean().sqrt()))
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2, errors
