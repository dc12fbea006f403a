"""Cross-entropy on all classes and on sampled ones against its definition."""

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.cross_entropy import exact_cross_entropy, sampled_cross_entropy
from hf_dis.teacher.targets import TeacherTargets


def test_exact_cross_entropy_and_its_gradient(dense_ce):
    logits, labels = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.tensor([0, 8, 3, 3, 1])
    loss, gradient = exact_cross_entropy(logits.detach(), labels)
    expected = dense_ce(logits, labels)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


def test_half_precision_logits_are_computed_in_float32():
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=0))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40), 2.0, 40)], torch.arange(5))
    narrow = torch.randn(5, 7).bfloat16()
    assert torch.equal(sampled_cross_entropy(narrow, sample), sampled_cross_entropy(narrow.float(), sample))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampled_cross_entropy_is_its_formula(temperature):
    """Written out item by item for a sample with weights, unused columns and a label; at temperature 1 always."""
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40), temperature, 10)], torch.arange(5))
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64)
    ce = sampled_cross_entropy(logits, sample)
    for item in range(5):
        weights = sample.log_weights[item].double().exp()
        label = logits[item, sample.label_column]
        torch.testing.assert_close(ce[item], (weights * logits[item].exp()).sum().log() - label)
