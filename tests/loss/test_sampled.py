"""The loss on sampled classes: its terms, and their mixture."""

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.cross_entropy import sampled_cross_entropy
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.loss.sampled import sampled_loss
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
