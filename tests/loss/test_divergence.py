"""The losses against their definitions, and DISLoss for loops of one's own."""

import hf_dis.targets
import pytest
import torch

from hf_dis import SamplerSpec, DISLoss, make_sampler
from hf_dis.loss.cross_entropy import exact_cross_entropy, sampled_cross_entropy
from hf_dis.loss.divergence import exact_distillation_loss, mix, sampled_forward_kl
from hf_dis.teacher.targets import TeacherTargets


@pytest.fixture
def batch():
    """Features, head and teacher logits of 6 items and 40 classes, float64; DISLoss takes them in this order."""
    shapes = [(6, 5), (40, 5), (40,), (6, 40)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
def test_exact_distillation_is_the_kl_divergence_times_squared_temperature(temperature, dense_kd):
    logits, teacher = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.randn(5, 9).double()
    found, expected = exact_distillation_loss(logits, teacher, temperature), dense_kd(logits, teacher, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    definition = temperature * ((logits / temperature).softmax(1) - (teacher / temperature).softmax(1))
    torch.testing.assert_close(gradient, definition.detach(), rtol=1e-10, atol=1e-12)


def test_exact_cross_entropy(dense_ce):
    logits, labels = torch.randn(5, 9, dtype=torch.float64), torch.tensor([0, 8, 3, 3, 1])
    torch.testing.assert_close(exact_cross_entropy(logits, labels), dense_ce(logits, labels))


def test_sampled_losses_are_their_formulas():
    """Written out column by column for a sample with weights, unused columns and a label."""
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40), 2.0, 10)], torch.arange(5))
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64)
    kd, signal = sampled_forward_kl(logits, sample, 2.0)
    ce = sampled_cross_entropy(logits, sample)
    for item in range(5):
        weights = sample.log_weights[item].double().exp()
        normaliser = (weights * (logits[item] / 2).exp()).sum()
        log_student = logits[item] / 2 - normaliser.log()
        expected = 4 * (sample.target[item] * (sample.log_probs[item] - log_student)).sum()
        torch.testing.assert_close(kd[item], expected, check_dtype=False)
        student_minus_teacher = log_student.exp() - sample.log_probs[item].exp()
        torch.testing.assert_close(signal[item], student_minus_teacher, check_dtype=False)
        label = logits[item, sample.label_column]
        torch.testing.assert_close(ce[item], (weights * logits[item].exp()).sum().log() - label)


@pytest.mark.parametrize("block", [1, 40, 2**18], ids=["item by item", "two items", "at once"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_gradient_of_the_sampled_loss_is_that_of_its_formula(block, temperature, monkeypatch):
    monkeypatch.setattr(hf_dis.targets, "BLOCK_ELEMENTS", block)
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40).double(), temperature, 10)], torch.arange(5))
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64, requires_grad=True)
    grad_losses = torch.rand(5, dtype=torch.float64)
    loss = sampled_forward_kl(logits, sample, temperature)[0]
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
    (gradient,) = torch.autograd.grad(sampled_forward_kl(logits, sample, 2.0)[0].sum(), logits)
    assert gradient.isfinite().all() and (gradient[:, 2] == 0).all() and (gradient[:, 0] != 0).all()


def test_half_precision_logits_are_computed_in_float32():
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=6, num_shared_classes=0))
    sample = sampler.sample([TeacherTargets(torch.randn(5, 40), 2.0, 40)], torch.arange(5))
    narrow = torch.randn(5, 7).bfloat16()
    wide = narrow.float()
    assert torch.equal(
        sampled_forward_kl(narrow, sample, 2.0)[0], sampled_forward_kl(wide, sample, 2.0)[0]
    )
    assert torch.equal(sampled_cross_entropy(narrow, sample), sampled_cross_entropy(wide, sample))
    assert torch.equal(exact_distillation_loss(narrow, narrow, 2.0), exact_distillation_loss(wide, wide, 2.0))
    assert torch.equal(exact_cross_entropy(narrow, torch.arange(5)), exact_cross_entropy(wide, torch.arange(5)))


def test_mix():
    kd, ce = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    torch.testing.assert_close(mix(kd, ce, 0.25), torch.tensor([1.5, 3.0]))
    assert torch.equal(mix(kd, None, 0.25), kd)


def test_dis_loss_takes_teacher_logits_in_chunks(batch):
    *head, teacher = batch
    labels = torch.arange(6)
    whole, chunked = (DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=8), seed=1)) for _ in range(2))
    for _ in range(3):
        expected = whole(*head, teacher, labels)
        torch.testing.assert_close(chunked(*head, (chunk for chunk in teacher.split(4)), labels), expected)


def test_dis_loss_learns_from_every_batch_and_leaves_the_teacher_without_gradient(batch):
    features, weight, bias, teacher = (tensor.requires_grad_() for tensor in batch)
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=8, num_shared_classes=4, rank_depth=10))
    before = {name: value.clone() for name, value in sampler.proposal.state_dict().items()}
    DISLoss(sampler)(features, weight, bias, teacher).backward()
    assert all(not torch.equal(value, before[name]) for name, value in sampler.proposal.state_dict().items())
    assert teacher.grad is None and features.grad is not None
    assert all(not value.requires_grad for value in sampler.proposal.state_dict().values())


def test_dis_loss_sums_statistics_over_processes(batch):
    """Two processes that saw the same batch learn what one learns from it."""
    alone, together = (make_sampler(40, SamplerSpec(num_sampled_classes=8, num_shared_classes=4, rank_depth=10)) for _ in range(2))
    DISLoss(alone)(*batch)
    DISLoss(together, reduce=lambda statistics: {name: 2 * value for name, value in statistics.items()})(*batch)
    for name, value in alone.proposal.state_dict().items():
        torch.testing.assert_close(together.proposal.state_dict()[name], value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("temperature", -1.0), ("hard_label_weight", 1.5), ("hard_label_weight", -0.1)],
)
def test_dis_loss_refuses_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DISLoss(make_sampler(40), **{name: value})


def test_dis_loss_refuses_a_head_of_other_classes(batch):
    with pytest.raises(ValueError, match=r"30.*40"):
        DISLoss(make_sampler(30, SamplerSpec(num_sampled_classes=8)))(*batch)


@pytest.mark.parametrize("num_classes", [30, 50])
def test_dis_loss_refuses_a_teacher_of_other_classes(batch, num_classes):
    *head, _ = batch
    with pytest.raises(ValueError, match=rf"answers for {num_classes} classes, the student for 40"):
        DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=8)))(*head, torch.randn(6, num_classes))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_dis_loss_refuses_nan_and_learns_nothing_from_it(batch, bad):
    *head, teacher = batch
    teacher[4, 7] = bad
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=8))
    before = {name: value.clone() for name, value in sampler.proposal.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in items \[4\]"):
        DISLoss(sampler)(*head, teacher.split(3))
    assert all(torch.equal(value, before[name]) for name, value in sampler.proposal.state_dict().items())


@pytest.mark.parametrize("label", [-1, 40])
def test_dis_loss_refuses_labels_out_of_range(batch, label):
    with pytest.raises(ValueError, match=rf"labels \[{label}\] are outside 0\.\.39"):
        DISLoss(make_sampler(40, SamplerSpec(num_sampled_classes=8)))(*batch, torch.tensor([0, 1, 2, label, 4, 5]))
