"""The sampled loss as an estimator of the exact one: exact with all classes, consistent with fewer, always finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import column_ids

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.loss.cross_entropy import sampled_cross_entropy
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.teacher.targets import TeacherTargets

C, TEMPERATURE = 40, 2.0
ALL_SAMPLED = {
    "per item": {"num_sampled_classes": 40, "num_shared_classes": 0, "rank_depth": 128},
    "per item, ranks unresolved": {"num_sampled_classes": 99, "num_shared_classes": 0, "rank_depth": 7},
    "two strata": {"num_sampled_classes": 7, "num_shared_classes": 40, "rank_depth": 7},
    "two strata, several tails": {
        "num_sampled_classes": 7,
        "num_shared_classes": 40,
        "num_tails": 4,
        "rank_depth": 7,
    },
}


# All classes sampled: the exact loss


@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("proposal", ["dis", "teacher", "uniform"])
@pytest.mark.parametrize("layout", ALL_SAMPLED.values(), ids=ALL_SAMPLED)
def test_with_all_classes_sampled_loss_and_gradients_are_exact(
    layout, proposal, labelled, temperature, dense_kd, dense_ce
):
    torch.manual_seed(1)
    teacher = 2 * torch.randn(6, C, dtype=torch.float64)
    labels = torch.randint(C, (6,)) if labelled else None
    parameters = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(6, 5), (C, 5), (C,)]]
    features, weight, bias = parameters

    logits = features @ weight.T + bias
    exact = dense_kd(logits, teacher, temperature)
    if labelled:
        exact = 0.7 * exact + 0.3 * dense_ce(logits, labels)
    exact = exact.mean()
    sampled = DISLoss(make_sampler(C, SamplerSpec(proposal=proposal, **layout)), temperature, 0.3)(
        features, weight, bias, teacher, labels
    )

    assert sampled.dtype == torch.float64
    assert abs(sampled - exact) <= 1e-10 * abs(exact)
    expected, found = (torch.autograd.grad(loss, parameters) for loss in (exact, sampled))
    for name, one, other in zip(("features", "weight", "bias"), expected, found, strict=True):
        assert (one - other).norm() <= 1e-10 * one.norm(), name


def test_k_of_all_classes_is_exact_whatever_the_other_arguments(dense_kd):
    teacher, features, weight = torch.randn(6, C), torch.randn(6, 5), torch.randn(C, 5)
    sampler = make_sampler(C, SamplerSpec(num_sampled_classes=C, num_shared_classes=8, rank_depth=7))
    sampled = DISLoss(sampler, TEMPERATURE)(features, weight, None, teacher)
    torch.testing.assert_close(sampled, dense_kd(features @ weight.T, teacher, TEMPERATURE).mean().float())


# Fewer classes: consistent


def expected_gradient(sampler, logits, teacher, labels, rounds, copies):
    """Mean over samples of the sampled loss's gradient on all logits, ``[2, C]`` for KD and CE, and its own error²."""
    means = []
    targets = [TeacherTargets(teacher.expand(copies, -1), TEMPERATURE, sampler.rank_depth)]
    for _ in range(rounds):
        sample = sampler.sample(targets, labels.expand(copies))
        ids = column_ids(sample)
        sampled = logits.expand(copies, -1).gather(1, ids).requires_grad_()
        losses = sampled_forward_kl(sampled, sample, TEMPERATURE).loss, sampled_cross_entropy(sampled, sample)
        gradients = [torch.autograd.grad(loss.sum(), sampled, retain_graph=True)[0] for loss in losses]
        scattered = [torch.zeros(copies, C, dtype=torch.float64).scatter_add_(1, ids, g) for g in gradients]
        means += torch.stack(scattered, 1).split(copies if sampler.num_shared else 1)
    means = torch.stack([mean.mean(0) for mean in means])
    return means.mean(0), means.var(0).sum(1) / len(means)


@pytest.mark.parametrize("proposal", ["dis", "teacher", "uniform"])
@pytest.mark.parametrize("layout", ["pps", "replacement", "two strata"])
def test_the_expected_gradient_is_near_the_exact_one_and_nearer_with_more_classes(
    layout, proposal, dense_kd, dense_ce
):
    torch.manual_seed(2)
    teacher = 1.5 * torch.randn(1, C, dtype=torch.float64)
    logits = 0.5 * torch.randn(1, C, dtype=torch.float64)
    labels = torch.tensor([17])
    dense = logits.clone().requires_grad_()
    losses = dense_kd(dense, teacher, TEMPERATURE), dense_ce(dense, labels)
    exact = torch.cat([torch.autograd.grad(loss.sum(), dense)[0] for loss in losses])

    biases = []
    for share in (1, 3):
        kinds = {"num_sampled_classes": 5 * share, "num_shared_classes": 0, "design": layout, "rank_depth": 20}
        if layout == "two strata":
            kinds |= {"num_shared_classes": 5 * share, "design": "pps"}
        sampler = make_sampler(C, SamplerSpec(proposal=proposal, **kinds), seed=5)
        samples = (200, 20) if layout == "two strata" else (1, 20_000)
        found, noise = expected_gradient(sampler, logits, teacher, labels, *samples)
        biases.append((((found - exact) ** 2).sum(1) - noise).clamp_min(0) / exact.square().sum(1))
    few, many = biases
    # The bias of a ratio falls as 1/K: its square to a ninth at three times K, give or take the noise of the samples.
    assert (many <= torch.tensor([0.03, 0.001])).all(), biases
    assert many[0] < few[0] / 2, biases


def test_with_more_tails_the_gradient_of_a_batch_is_less_noisy(dense_kd):
    """Items that agree, so that what is noise for one item is noise for all that share its tail."""
    num_items, width = 24, 6
    teacher = (torch.randn(1, C) + 0.1 * torch.randn(num_items, C)).double()
    features = (torch.randn(1, width) + 0.1 * torch.randn(num_items, width)).double()
    weight = torch.randn(C, width, dtype=torch.float64, requires_grad=True)
    loss = dense_kd(features @ weight.T, teacher, TEMPERATURE).mean()
    (exact,) = torch.autograd.grad(loss, weight)

    def error(num_tails):
        sampler = make_sampler(
            C, SamplerSpec(num_sampled_classes=2, num_shared_classes=8, num_tails=num_tails, rank_depth=2)
        )
        found = (DISLoss(sampler, TEMPERATURE)(features, weight, None, teacher) for _ in range(100))
        errors = [(torch.autograd.grad(loss, weight)[0] - exact).square().sum() for loss in found]
        return torch.stack(errors).mean() / exact.square().sum()

    errors = [error(num_tails) for num_tails in (1, 2, 4)]
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.7 * errors[1], errors


# Numbers of every size


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    teacher_size=st.floats(0, 1e4),
    student_size=st.floats(0, 1e4),
    temperature=st.floats(0.05, 100),
    layout=st.sampled_from([{"num_shared_classes": 0}, {"num_shared_classes": 6}]),
    proposal=st.sampled_from(["dis", "teacher", "uniform", "topk"]),
    labels=st.sampled_from([None, torch.tensor([0, 39, 7])]),
)
def test_loss_and_gradients_are_finite(dtype, teacher_size, student_size, temperature, layout, proposal, labels):
    torch.manual_seed(0)
    teacher = (teacher_size * (2 * torch.rand(3, C) - 1)).to(dtype)
    sampler = make_sampler(C, SamplerSpec(num_sampled_classes=5, rank_depth=10, proposal=proposal, **layout))
    sample = sampler.sample([TeacherTargets(teacher, temperature, 10)], labels)
    logits = (student_size * (2 * torch.rand(sample.log_weights.shape) - 1)).to(dtype).requires_grad_()
    loss = sampled_forward_kl(logits, sample, temperature).loss
    if labels is not None:
        loss = loss + sampled_cross_entropy(logits, sample)
    (gradient,) = torch.autograd.grad(loss.mean(), logits)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_what_is_learnt_from_extreme_logits_is_finite():
    """An item uses no tail column of a class in its own top: the student's logit there must not count."""
    teacher = torch.arange(C, 0, -1.0).expand(3, -1)
    sampler = make_sampler(C, SamplerSpec(num_sampled_classes=1, num_shared_classes=C, rank_depth=2))
    sample = sampler.sample([TeacherTargets(teacher, 1.0, 2)])
    logits = torch.zeros(sample.log_weights.shape)
    logits[:, 1:3] = 200.0  # the two classes of the top, as tail columns
    logits[:, 0] = 0.0
    sampler.learn(sample, sampled_forward_kl(logits, sample, 1.0).signal)
    assert all(value.isfinite().all() for value in sampler.proposal.state_dict().values())
