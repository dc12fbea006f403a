"""Every divergence against its definition: exact, sampled, at its limits, and as an estimator."""

import pytest
import torch
from divergences_by_definition import BOUNDED, EVERY, OTHERS, definition
from extreme_cases import EXAMPLES, cases
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import column_ids

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.loss.divergence import ForwardKL
from hf_dis.loss.f_divergence import JensenShannon, ReverseKL, SkewKL, make_divergence
from hf_dis.teacher.targets import TeacherTargets

C = 40
ALL_SAMPLED = {
    "per item": {"num_sampled_classes": 40, "num_shared_classes": 0, "rank_depth": 128},
    "two strata": {
        "num_sampled_classes": 7,
        "num_shared_classes": 40,
        "num_tails": 4,
        "rank_depth": 7,
    },
}


def settings_of(divergence):
    """The arguments of DISLoss that choose a divergence."""
    beta, alpha = getattr(divergence, "beta", None), getattr(divergence, "alpha", None)
    return {"divergence": divergence.name, "jsd_beta": beta, "skew_alpha": alpha}


def with_definition(divergence, logits, teacher, temperature):
    """The definition, and its gradient by autograd."""
    logits = logits.detach().double().requires_grad_()
    loss = definition(divergence, logits, teacher, temperature)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


# On all classes


@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("divergence", EVERY.values(), ids=EVERY)
def test_on_all_classes_loss_and_gradient_are_those_of_the_definition(divergence, temperature):
    logits, teacher = torch.randn(2, 5, 9, dtype=torch.float64).unbind()
    found = divergence.exact(logits, teacher, temperature)
    for one, other in zip(found, with_definition(divergence, logits, teacher, temperature), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("proposal", ["dis", "teacher", "uniform"])
@pytest.mark.parametrize("layout", ALL_SAMPLED.values(), ids=ALL_SAMPLED)
@pytest.mark.parametrize("divergence", OTHERS.values(), ids=OTHERS)
def test_with_all_classes_sampled_loss_and_gradients_are_exact(divergence, layout, proposal, labelled, dense_ce):
    teacher = 2 * torch.randn(6, C, dtype=torch.float64)
    labels = torch.randint(C, (6,)) if labelled else None
    parameters = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(6, 5), (C, 5), (C,)]]
    features, weight, bias = parameters
    logits = features @ weight.T + bias
    exact = definition(divergence, logits, teacher, 2.0)
    exact = (0.7 * exact + 0.3 * dense_ce(logits, labels) if labelled else exact).mean()
    sampler = make_sampler(C, SamplerSpec(proposal=proposal, **layout))
    sampled = DISLoss(sampler, 2.0, 0.3, **settings_of(divergence))(features, weight, bias, teacher, labels)
    assert abs(sampled - exact) <= 1e-10 * abs(exact)
    expected, found = (torch.autograd.grad(loss, parameters) for loss in (exact, sampled))
    for name, one, other in zip(("features", "weight", "bias"), expected, found, strict=True):
        assert (one - other).norm() <= 1e-10 * one.norm(), name


def test_the_jensen_shannon_divergence_has_both_kls_as_limits():
    logits, teacher = torch.randn(2, 5, 9, dtype=torch.float64).unbind()
    share = 1e-7
    for beta, limit in ((share, ForwardKL()), (1 - share, ReverseKL())):
        found = JensenShannon(beta=beta).exact(logits, teacher, 2.0)
        for one, other in zip(found, limit.exact(logits, teacher, 2.0), strict=True):
            torch.testing.assert_close(one / share, other, rtol=1e-5, atol=1e-5)


def test_the_skew_kl_has_the_forward_kl_as_limit():
    logits, teacher = torch.randn(2, 5, 9, dtype=torch.float64).unbind()
    for one, other in zip(
        SkewKL(alpha=1e-9).exact(logits, teacher, 2.0), ForwardKL().exact(logits, teacher, 2.0), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


# On sampled classes


def a_sample(temperature, num_items=5, **spec):
    spec = {"num_sampled_classes": 6, "num_shared_classes": 8, "rank_depth": 10} | spec
    sampler = make_sampler(C, SamplerSpec(**spec))
    labels = torch.arange(num_items)
    return sampler.sample([TeacherTargets(torch.randn(num_items, C).double(), temperature, 10)], labels)


def formula(divergence, logits, sample, temperature):
    """The estimate column by column, written with probabilities: τ² Σ ω (the divergence's term of a class)."""
    weights, teacher = sample.log_weights.double().exp(), sample.log_probs.exp()
    student = (logits / temperature).exp()
    student = student / (weights * student).sum(1, keepdim=True)
    match divergence:
        case ReverseKL():
            terms = student * (student / teacher).log() - student + teacher
        case JensenShannon(beta=beta):
            mixture = beta * teacher + (1 - beta) * student
            terms = beta * teacher * (teacher / mixture).log() + (1 - beta) * student * (student / mixture).log()
        case SkewKL(alpha=alpha):
            mixture = alpha * teacher + (1 - alpha) * student
            terms = teacher * (teacher / mixture).log() - teacher + mixture
    return temperature**2 * (weights * terms).sum(1)


@pytest.mark.parametrize("block", [1, 2**18], ids=["item by item", "at once"])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("divergence", OTHERS.values(), ids=OTHERS)
def test_the_sampled_loss_and_its_gradient_are_those_of_its_formula(divergence, temperature, block, monkeypatch):
    monkeypatch.setattr("hf_dis.teacher.targets.BLOCK_ELEMENTS", block)
    sample = a_sample(temperature)
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64, requires_grad=True)
    grad_losses = torch.rand(5, dtype=torch.float64)
    found, expected = (
        divergence.sampled(logits, sample, temperature),
        formula(divergence, logits, sample, temperature),
    )
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6)  # the weights are in float32
    gradients = [torch.autograd.grad(loss, logits, grad_losses)[0] for loss in (found.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    # The signal is the gradient without the weights, up to the factor.
    used = sample.log_weights > -torch.inf
    gradient = gradients[0] / grad_losses[:, None] / sample.log_weights.exp() / temperature
    torch.testing.assert_close(found.signal[used], gradient[used], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", OTHERS.values(), ids=OTHERS)
def test_a_student_that_agrees_has_no_gradient_whatever_the_sample(divergence):
    sample = a_sample(2.0)
    logits = (2 * sample.log_probs + torch.randn(5, 1)).requires_grad_()
    found = divergence.sampled(logits, sample, 2.0)
    (gradient,) = torch.autograd.grad(found.loss.sum(), logits)
    assert gradient.abs().max() < 1e-6 and (found.loss >= 0).all()


@pytest.mark.parametrize("divergence", EVERY.values(), ids=EVERY)
def test_without_the_scale_loss_and_gradient_are_divided_by_the_squared_temperature(divergence):
    plain = make_divergence(**settings_by_name(divergence), scale_by_temperature=False)
    sample = a_sample(3.0)
    logits = torch.randn(sample.log_weights.shape, dtype=torch.float64, requires_grad=True)
    dense, teacher = torch.randn(2, 5, 9, dtype=torch.float64).unbind()
    pairs = list(zip(plain.exact(dense, teacher, 3.0), divergence.exact(dense, teacher, 3.0), strict=True))
    losses = [one.sampled(logits, sample, 3.0).loss for one in (plain, divergence)]
    pairs += [losses, [torch.autograd.grad(loss.sum(), logits)[0] for loss in losses]]
    for one, other in pairs:
        torch.testing.assert_close(9 * one, other)


@pytest.mark.parametrize("divergence", OTHERS.values(), ids=OTHERS)
def test_the_sampler_learns_from_the_signal_of_the_divergence(divergence, monkeypatch):
    sampler, learnt = make_sampler(C, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10)), []
    monkeypatch.setattr(sampler, "learn", lambda sample, signal, *others: learnt.append((sample, signal)))
    features, weight, teacher = torch.randn(5, 3), torch.randn(C, 3), torch.randn(5, C)
    DISLoss(sampler, 2.0, **settings_of(divergence))(features, weight, None, teacher)
    ((sample, signal),) = learnt
    columns = (features @ weight.T).gather(1, column_ids(sample))
    torch.testing.assert_close(signal, divergence.sampled(columns, sample, 2.0).signal)


def settings_by_name(divergence):
    """The arguments of make_divergence."""
    given = settings_of(divergence)
    return {"name": given.pop("divergence"), **given}


@pytest.mark.parametrize("layout", ["pps", "replacement", "two strata"])
@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon(), SkewKL()], ids=lambda one: one.name)
def test_the_expected_gradient_is_near_the_exact_one_and_nearer_with_more_classes(divergence, layout):
    torch.manual_seed(2)
    teacher = 1.5 * torch.randn(1, C, dtype=torch.float64)
    logits = 0.5 * torch.randn(1, C, dtype=torch.float64)
    _, exact = with_definition(divergence, logits, teacher, 2.0)
    biases = []
    for share in (1, 3):
        kinds = {"num_sampled_classes": 5 * share, "num_shared_classes": 0, "design": layout, "rank_depth": 20}
        if layout == "two strata":
            kinds |= {"num_shared_classes": 5 * share, "design": "pps"}
        sampler = make_sampler(C, SamplerSpec(**kinds), seed=5)
        rounds, copies = (400, 10) if layout == "two strata" else (1, 8_000)
        means = []
        for _ in range(rounds):
            sample = sampler.sample([TeacherTargets(teacher.expand(copies, -1), 2.0, sampler.rank_depth)])
            ids = column_ids(sample)
            columns = logits.expand(copies, -1).gather(1, ids).requires_grad_()
            loss = divergence.sampled(columns, sample, 2.0).loss.sum()
            (gradient,) = torch.autograd.grad(loss, columns)
            scattered = torch.zeros(copies, C, dtype=torch.float64).scatter_add_(1, ids, gradient)
            means += scattered.mean(0, keepdim=True) if layout == "two strata" else scattered
        means = torch.stack(list(means))
        noise = means.var(0).sum() / len(means)
        bias = ((means.mean(0) - exact[0]).square().sum() - noise).clamp_min(0) / exact.square().sum()
        biases.append(float(bias))
    few, many = biases
    # The bias falls as 1/K: its square to a ninth at three times K, give or take the noise of the samples.
    assert many < 0.1 and many < few / 2, biases


# At the limits of numbers


@EXAMPLES
@given(cases(), st.sampled_from(sorted(EVERY)))
def test_loss_and_gradients_are_finite_through_steps_of_learning(case, name):
    divergence, logits = EVERY[name], case["teacher_logits"]
    sampler = make_sampler(logits.shape[1], SamplerSpec(**case["spec"]))
    dis_loss = DISLoss(sampler, case["temperature"], **settings_of(divergence))
    leaves = [tensor.clone().requires_grad_() for tensor in (case["features"], case["weight"])]
    if divergence.needs_full_support and logits.isneginf().any():
        with pytest.raises(ValueError, match="reverse_kl"):
            dis_loss(*leaves, None, logits, case["labels"])
        return
    for _ in range(3):
        loss = dis_loss(*leaves, None, logits, case["labels"])
        gradients = torch.autograd.grad(loss, leaves)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all(value.double().isfinite().all() for value in sampler.state_dict().values())


@EXAMPLES
@given(cases(layouts=["per item"], designs=["pps"]), st.sampled_from(sorted(EVERY)))
def test_with_all_classes_sampled_it_is_the_definition_in_float64(case, name):
    divergence, teacher, temperature = EVERY[name], case["teacher_logits"].double(), case["temperature"]
    if divergence.needs_full_support and teacher.isneginf().any():
        return
    num_classes = teacher.shape[1]
    spec = SamplerSpec(**case["spec"] | {"num_sampled_classes": num_classes, "rank_depth": None})
    sampler = make_sampler(num_classes, spec)
    sample = sampler.sample([TeacherTargets(teacher, temperature, sampler.rank_depth)])
    student = (case["features"] @ case["weight"].T).double()
    ids = sample.item_ids
    columns = student.gather(1, ids).requires_grad_()
    loss = divergence.sampled(columns, sample, temperature).loss
    (gradient,) = torch.autograd.grad(loss.sum(), columns)
    exact, exact_gradient = divergence.exact(student, teacher, temperature)
    scale = max(1.0, float(exact.abs().max()))
    torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-9 * scale)
    torch.testing.assert_close(gradient, exact_gradient.gather(1, ids), rtol=1e-9, atol=1e-9 * scale)
    # A gradient on logits moves no mass in or out.
    assert exact_gradient.sum(1).abs().max() <= 1e-9 * scale
    log_student, log_teacher = ((values / temperature).log_softmax(1) for values in (student, teacher))
    if min(log_student.min(), log_teacher.min()) > -600:  # probabilities that float64 can hold
        expected, expected_gradient = with_definition(divergence, student, teacher, temperature)
        torch.testing.assert_close(exact, expected, rtol=1e-8, atol=1e-8 * scale)
        torch.testing.assert_close(exact_gradient, expected_gradient, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("divergence", EVERY.values(), ids=EVERY)
def test_a_student_that_masks_what_the_teacher_masks(divergence):
    teacher, student = torch.randn(2, 3, 6).double()
    teacher[:, :2] = student[:, :2] = -torch.inf
    sample = make_sampler(6, SamplerSpec(num_sampled_classes=6)).sample([TeacherTargets(teacher, 2.0, 6)])
    columns = student.gather(1, sample.item_ids).requires_grad_()
    found = divergence.sampled(columns, sample, 2.0)
    (gradient,) = torch.autograd.grad(found.loss.sum(), columns)
    expected, expected_gradient = divergence.exact(student[:, 2:], teacher[:, 2:], 2.0)
    whole, whole_gradient = divergence.exact(student, teacher, 2.0)
    for loss in (found.loss, whole):
        torch.testing.assert_close(loss, expected)
    for one in (torch.zeros_like(student).scatter(1, sample.item_ids, gradient), whole_gradient):
        assert (one[:, :2] == 0).all()
        torch.testing.assert_close(one[:, 2:], expected_gradient)
    assert found.signal.isfinite().all()


@pytest.mark.parametrize("divergence", BOUNDED.values(), ids=BOUNDED)
def test_a_teacher_that_masks_classes_which_the_student_does_not(divergence):
    teacher, student = torch.randn(2, 3, 6).double()
    teacher[:, :2] = -torch.inf
    for one, other in zip(
        divergence.exact(student, teacher, 2.0), with_definition(divergence, student, teacher, 2.0), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_the_reverse_kl_refuses_a_teacher_that_masks_classes(masked):
    teacher = torch.randn(6, C)
    teacher[4, 7] = masked
    dis_loss = DISLoss(make_sampler(C), divergence="reverse_kl")
    with pytest.raises(ValueError, match=r"items \[4\].*infinite.*'jsd' or 'skew_kl'.*floor"):
        dis_loss(torch.randn(6, 5), torch.randn(C, 5), None, [teacher[:3], teacher[3:]])


@pytest.mark.parametrize("divergence", OTHERS.values(), ids=OTHERS)
def test_half_precision_logits_are_computed_in_float32(divergence):
    sample = a_sample(2.0)
    narrow = torch.randn(sample.log_weights.shape).bfloat16()
    losses = [divergence.sampled(values, sample, 2.0).loss for values in (narrow, narrow.float())]
    assert torch.equal(*losses)


# Settings


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"name": "kl"}, ValueError, "divergence is 'kl'.*forward_kl, reverse_kl, jsd, skew_kl"),
        ({"name": "jsd", "jsd_beta": 0.0}, ValueError, r"jsd_beta is 0.0.*in \(0, 1\).*'forward_kl'"),
        ({"name": "jsd", "jsd_beta": 1}, ValueError, r"jsd_beta is 1:.*'reverse_kl'"),
        ({"name": "jsd", "jsd_beta": "half"}, TypeError, "jsd_beta is 'half'"),
        ({"name": "skew_kl", "skew_alpha": 1.5}, ValueError, "skew_alpha is 1.5"),
        ({"name": "reverse_kl", "jsd_beta": 0.5}, ValueError, "jsd_beta is 0.5.*None with divergence='reverse_kl'"),
        ({"name": "jsd", "skew_alpha": 0.1}, ValueError, "skew_alpha is 0.1.*set divergence='skew_kl'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        make_divergence(**given)


def test_settings_make_their_divergence():
    assert make_divergence("forward_kl") == ForwardKL()
    assert make_divergence("reverse_kl", scale_by_temperature=False) == ReverseKL(False)
    assert make_divergence("jsd") == JensenShannon(beta=0.5)
    assert make_divergence("jsd", 0.3) == JensenShannon(beta=0.3)
    assert make_divergence("skew_kl", skew_alpha=0.2) == SkewKL(alpha=0.2)
