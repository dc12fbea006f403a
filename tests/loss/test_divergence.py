"""The divergences against their definitions: sampled, exact, and for a teacher known at some classes."""

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.divergence import FORWARD_KL, exact_forward_kl, mix, sampled_forward_kl, sparse_forward_kl
from hf_dis.teacher.targets import TeacherTargets


def kl_gradient(logits, teacher, temperature):
    """τ (s - p), by definition."""
    return temperature * ((logits / temperature).softmax(1) - (teacher / temperature).softmax(1))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
def test_exact_distillation_is_the_kl_divergence_times_squared_temperature(temperature, dense_kd):
    logits, teacher = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.randn(5, 9).double()
    expected = dense_kd(logits, teacher, temperature)
    loss, gradient = exact_forward_kl(logits.detach(), teacher, temperature)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected.sum(), logits), rtol=1e-10, atol=1e-12)
    definition = kl_gradient(logits, teacher, temperature).detach()
    torch.testing.assert_close(gradient, definition, rtol=1e-10, atol=1e-12)


def test_a_teacher_known_at_all_classes_in_any_order_is_the_exact_one(dense_kd):
    logits, teacher = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9).double()
    ids = torch.rand(5, 9).argsort(1)
    log_probs = (teacher / 2).log_softmax(1).gather(1, ids)
    loss, gradient = sparse_forward_kl(logits, ids, log_probs, log_probs.exp(), 2.0)
    torch.testing.assert_close(loss, dense_kd(logits, teacher, 2.0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, kl_gradient(logits, teacher, 2.0), rtol=1e-10, atol=1e-12)


def test_the_sampled_loss_is_its_formula():
    """Written out column by column for a sample with weights, unused columns and a label."""
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40), 2.0, 10)], torch.arange(5))
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64)
    kd, signal, log_students, _ = sampled_forward_kl(logits, sample, 2.0)
    for item in range(5):
        weights = sample.log_weights[item].double().exp()
        normaliser = (weights * (logits[item] / 2).exp()).sum()
        log_student = logits[item] / 2 - normaliser.log()
        expected = 4 * (sample.target[item] * (sample.log_probs[item] - log_student)).sum()
        torch.testing.assert_close(kd[item], expected, check_dtype=False)
        student_minus_teacher = log_student.exp() - sample.log_probs[item].exp()
        torch.testing.assert_close(signal[item], student_minus_teacher, check_dtype=False)
        torch.testing.assert_close(log_students[item], log_student, check_dtype=False)


@pytest.mark.parametrize("block", [1, 40, 2**18], ids=["item by item", "two items", "at once"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_gradient_of_the_sampled_loss_is_that_of_its_formula(block, temperature, monkeypatch):
    monkeypatch.setattr("hf_dis.teacher.targets.BLOCK_ELEMENTS", block)
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40).double(), temperature, 10)], torch.arange(5))
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64, requires_grad=True)
    grad_losses = torch.rand(5, dtype=torch.float64)
    loss = sampled_forward_kl(logits, sample, temperature).loss
    (gradient,) = torch.autograd.grad(loss, logits, grad_losses)
    normaliser = (logits / temperature + sample.log_weights).logsumexp(1, keepdim=True)
    formula = temperature**2 * (sample.target * (sample.log_probs - logits / temperature + normaliser)).sum(1)
    (expected,) = torch.autograd.grad(formula, logits, grad_losses)
    torch.testing.assert_close(loss, formula, rtol=1e-7, atol=1e-7)  # the weights are in float32
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-7)


def test_masked_logits_have_no_gradient():
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=0))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40), 2.0, 40)])
    logits = torch.randn(5, 6)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(sampled_forward_kl(logits, sample, 2.0).loss.sum(), logits)
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all() and (gradient[:, 0] != 0).all()


def test_half_precision_logits_are_computed_in_float32():
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=0))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40), 2.0, 40)], torch.arange(5))
    narrow = torch.randn(5, 7).bfloat16()
    assert torch.equal(
        sampled_forward_kl(narrow, sample, 2.0).loss, sampled_forward_kl(narrow.float(), sample, 2.0).loss
    )


def test_half_precision_gradients_are_scaled_in_float32():
    """A loss scale of 2^16 is infinite in float16, and its product with the gradient is not."""
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=0))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40), 0.5, 40)], torch.arange(5))
    narrow = torch.randn(5, 7).half()
    gradients = []
    for logits in (narrow.requires_grad_(), narrow.detach().float().requires_grad_()):
        loss = sampled_forward_kl(logits, sample, 0.5).loss
        gradients += torch.autograd.grad(loss, logits, torch.full((5,), 2.0**16))
    assert gradients[1].abs().max() < 2.0**15
    assert torch.equal(gradients[0], gradients[1].half())


def test_mix():
    kd, ce = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    torch.testing.assert_close(mix(kd, ce, 0.25), torch.tensor([1.5, 3.0]))
    assert torch.equal(mix(kd, None, 0.25), kd)


def test_stored_targets_in_float32_do_not_narrow_the_loss_of_a_wider_student():
    logits, target = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5).softmax(1)
    given = torch.zeros(3, 5), target.log(), target
    results = FORWARD_KL.results(logits, *given, 2.0)
    assert all(result.dtype == torch.float64 for result in results)
    expected = FORWARD_KL.results(logits, *(values.double() for values in given), 2.0)[0]
    torch.testing.assert_close(results[0], expected, rtol=1e-14, atol=0)
