"""The maths at its limits: any numbers of classes, any temperature, huge logits, ties, masked and certain classes."""

import pytest
import torch
from extreme_cases import EXAMPLES, ITEMS, cases
from hypothesis import given
from tiny_models import column_ids

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.loss.divergence import exact_forward_kl, sampled_forward_kl
from hf_dis.loss.exact import exact_loss
from hf_dis.teacher.targets import TeacherTargets


@EXAMPLES
@given(cases())
def test_loss_and_gradients_are_finite_through_steps_of_learning(case):
    num_classes = case["teacher_logits"].shape[1]
    dis_loss = DISLoss(make_sampler(num_classes, SamplerSpec(**case["spec"])), case["temperature"])
    leaves = [tensor.clone().requires_grad_() for tensor in (case["features"], case["weight"])]
    for _ in range(3):
        loss = dis_loss(*leaves, None, case["teacher_logits"], case["labels"])
        gradients = torch.autograd.grad(loss, leaves)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all(value.double().isfinite().all() for value in dis_loss.sampler.state_dict().values())


@EXAMPLES
@given(cases())
def test_mass_is_conserved_and_ids_are_distinct(case):
    logits = case["teacher_logits"]
    num_classes = logits.shape[1]
    sampler = make_sampler(num_classes, SamplerSpec(**case["spec"]))
    targets = TeacherTargets(logits, case["temperature"], sampler.rank_depth)
    sample = sampler.sample([targets], case["labels"])
    used = sample.log_weights > -torch.inf
    ids = column_ids(sample)
    probs = (logits.double() / case["temperature"]).softmax(1).gather(1, ids)
    assert ((ids >= 0) & (ids < num_classes)).all()
    assert (sample.target >= 0).all() and not sample.target.isnan().any()
    assert (sample.target[~used] == 0).all() and (sample.target[probs == 0] == 0).all()
    could = (used & (probs > 1e-30)).any(1)
    torch.testing.assert_close(sample.target.sum(1)[could], torch.ones(int(could.sum())), rtol=0, atol=1e-4)
    if case["spec"]["design"] == "pps":
        for item in range(ITEMS):
            assert len(ids[item, used[item]].unique()) == int(used[item].sum())
        ranked = sample.item_ids[:, : sampler.num_sampled].sort(1).values
        assert ranked.shape[1] == min(case["spec"]["num_sampled_classes"], sampler.num_ranks)
        assert (ranked.diff() > 0).all()


@EXAMPLES
@given(cases(layouts=["per item"], designs=["pps"]))
def test_with_all_classes_sampled_it_is_the_exact_loss_of_float64(case):
    """Masked classes have no part in it: p log p is 0 at p = 0."""
    logits, temperature = case["teacher_logits"].double(), case["temperature"]
    num_classes = logits.shape[1]
    sampler = make_sampler(
        num_classes, SamplerSpec(**case["spec"] | {"num_sampled_classes": num_classes, "rank_depth": None})
    )
    sample = sampler.sample([TeacherTargets(logits, temperature, sampler.rank_depth)])
    student = (case["features"] @ case["weight"].T).double()
    student.requires_grad_()
    loss = sampled_forward_kl(student.gather(1, sample.item_ids), sample, temperature).loss
    exact, _ = exact_loss(student, num_classes, [logits], None, temperature, 0.0)
    teacher, log_student = (logits / temperature).softmax(1), (student / temperature).log_softmax(1)
    expected = temperature**2 * (torch.special.xlogy(teacher, teacher) - teacher * log_student).sum(1)
    for found in (loss, exact):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * temperature**2)
        gradient = torch.autograd.grad(found.sum(), student)[0]
        reference = temperature * (log_student.exp() - teacher)
        torch.testing.assert_close(gradient, reference.detach(), rtol=1e-9, atol=1e-9 * temperature)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_student_that_masks_what_the_teacher_masks(sampled):
    teacher, student = torch.randn(2, ITEMS, 6).double()
    teacher[:, :2] = student[:, :2] = -torch.inf
    student.requires_grad_()
    if sampled:
        sampler = make_sampler(6, SamplerSpec(num_sampled_classes=6))
        sample = sampler.sample([TeacherTargets(teacher, 2.0, 6)])
        result = sampled_forward_kl(student.gather(1, sample.item_ids), sample, 2.0)
        loss = result.loss
        assert result.signal.isfinite().all()
    else:
        loss, _ = exact_loss(student, 6, [teacher], None, 2.0, 0.0)
    unmasked, _ = exact_forward_kl(student[:, 2:].detach(), teacher[:, 2:], 2.0)
    torch.testing.assert_close(loss, unmasked)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.isfinite().all() and (gradient[:, :2] == 0).all() and (gradient[:, 2:] != 0).all()
