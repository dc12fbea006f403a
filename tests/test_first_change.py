"""CONTRIBUTING's first change, a new divergence: its blocks run, and its gradients are those of float64 autograd."""

import re
from pathlib import Path

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.teacher.targets import TeacherTargets

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def divergence():
    """The divergence of the page, after all of its blocks ran."""
    section = PAGE.read_text().split("## Your first change\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    namespace = {"__name__": "first_change"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), namespace)
    return namespace["Triangular"]()


def by_definition(logits, log_weights, log_teacher, temperature):
    """τ² Σ ω (p - s)² / (p + s) of each item, with the normaliser of s estimated from the same classes."""
    weights, teacher = log_weights.double().exp(), log_teacher.double().exp()
    student = (logits / temperature).exp()
    student = student / (weights * student).sum(1, keepdim=True)
    return temperature**2 * (weights * (teacher - student) ** 2 / (teacher + student)).sum(1)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_exact_gradient_is_that_of_autograd(divergence, temperature):
    logits, teacher = torch.randn(2, 7, 30, dtype=torch.float64)
    logits.requires_grad_()
    expected = by_definition(logits, torch.zeros(7, 30), (teacher / temperature).log_softmax(1), temperature)
    loss, gradient = divergence.exact(logits.detach(), teacher, temperature)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_sampled_gradient_is_that_of_autograd(divergence, temperature):
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40).double(), temperature, 10)], torch.arange(5))
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64, requires_grad=True)
    expected = by_definition(logits, sample.log_weights, sample.log_probs, temperature)
    found = divergence.sampled(logits, sample, temperature)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6)  # the weights are in float32
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_loss_and_gradient_are_finite_and_bounded_at_extremes(divergence):
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [-1e4, 1e4, 0.0]])
    teacher = torch.tensor([[-1e4, 0.0, 1e4], [-torch.inf, 0.0, 0.0], [-1e4, 1e4, 0.0]])
    loss, gradient = divergence.exact(logits, teacher, 1.0)
    assert gradient.isfinite().all() and loss.ge(0).all() and loss.le(2 + 1e-6).all()
    assert loss[0].item() == pytest.approx(2) and loss[2].item() == 0
