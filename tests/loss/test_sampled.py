"""The loss on sampled classes: its terms, and their mixture."""

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.cross_entropy import sampled_cross_entropy
from hf_dis.loss.divergence import FORWARD_KL, sampled_forward_kl
from hf_dis.loss.f_divergence import JensenShannon
from hf_dis.loss.sampled import finite_items, sampled_loss
from hf_dis.teacher.targets import TeacherTargets


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [None, torch.arange(5)], ids=["no labels", "labels"])
def test_the_loss_is_the_mixture_of_its_terms(labels, weight):
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40).double(), 2.0, 10)], labels)
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64, requires_grad=True)
    loss, terms, divergence = sampled_loss(logits, sample, 2.0, weight)
    expected = kd = sampled_forward_kl(logits, sample, 2.0).loss
    if labels is not None:
        expected = (1 - weight) * kd + weight * sampled_cross_entropy(logits, sample)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(one.sum(), logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert set(terms) == ({"kd_loss"} if labels is None else {"kd_loss", "ce_loss"})
    assert not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(terms["kd_loss"], kd.detach())
    assert torch.equal(divergence.loss, kd) and not divergence.signal.requires_grad


@pytest.mark.parametrize("divergence", [FORWARD_KL, JensenShannon()], ids=lambda one: one.name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_gradient_tells_the_items_with_a_finite_signal(bad, divergence):
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=6))
    teacher = torch.randn(5, 40)
    sample = sampler.sample([TeacherTargets(teacher, 2.0, 6)], teacher.argmax(1))
    logits = torch.randn(sample.log_weights.shape)
    logits[1, sample.label_column] = bad
    logits[2, 0] = 1e4  # the label has a column of its own, and nothing bounds the logit in this one
    logits[3] = -torch.inf
    loss, _, result = sampled_loss(logits.requires_grad_(), sample, 2.0, 0.3, divergence)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert sample.log_weights[2, 0] == -torch.inf and result.signal[2, 0] == torch.inf
    finite = finite_items(gradient)
    assert torch.equal(finite, sample.finite_items(result.signal))
    assert finite.tolist() == [True, bad == -torch.inf, True, False, True]
