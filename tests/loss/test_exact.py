"""The exact loss: value and gradient against dense float64 autograd, and the memory that it takes."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.exact import exact_loss, exact_losses
from hf_dis.loss.sampled import sampled_loss
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import TargetLayout, compact_targets
from hf_dis.teacher.targets import TeacherTargets

N, C, TEMPERATURE = 7, 23, 2.0
TEACHERS = ["dense", "stored", "none"]


def student_logits(num_items=N, width=C, dtype=torch.float64):
    return torch.randn(num_items, width, dtype=torch.float64).to(dtype).requires_grad_()


def teacher_of(kind, num_items=N, dtype=torch.float64):
    """The teacher's answer in chunks, and its target and log-probabilities as dense float64 tensors."""
    logits = 3 * torch.randn(num_items, C, dtype=torch.float64)
    if kind == "none":
        return None, None, None
    if kind == "dense":
        log_probs = (logits / TEMPERATURE).log_softmax(1)
        return logits.split(max(1, num_items - 2)), log_probs.exp(), log_probs
    layout, generator = TargetLayout(C, 4, 6), torch.Generator().manual_seed(0)
    compact = compact_targets(logits.to(dtype), TEMPERATURE, layout.depth, layout.sample_size, generator)
    stored = CachedTargets(compact, C)
    target = torch.zeros(num_items, C).double().scatter_add_(1, stored.ids, stored.target.double())
    log_probs = torch.zeros(num_items, C).double().scatter_(1, stored.ids, stored.log_probs.double())
    size = max(1, num_items - 2)
    chunks = [type(compact)(*parts) for parts in zip(*(part.split(size) for part in compact), strict=True)]
    return [CachedTargets(chunk, C) for chunk in chunks], target, log_probs


def reference(logits, target, log_probs, labels, weight):
    """(1 - λ) τ² Σ p (log p - log s) + λ CE by autograd in float64, on the first C logits."""
    logits = logits.double()[:, :C]
    ce = None if labels is None else F.cross_entropy(logits, labels, reduction="none")
    if target is None:
        return ce
    log_student = (logits / TEMPERATURE).log_softmax(1)
    kd = TEMPERATURE**2 * (target * (log_probs - log_student)).sum(1)
    return kd if ce is None else (1 - weight) * kd + weight * ce


def assert_is_reference(logits, loss, expected, atol):
    factors = torch.rand(len(loss)).to(loss.dtype)
    (found,) = torch.autograd.grad(loss, logits, factors)
    (gradient,) = torch.autograd.grad(expected, logits, factors.double())
    assert found.dtype == logits.dtype
    torch.testing.assert_close(loss.double(), expected, rtol=atol, atol=atol)
    torch.testing.assert_close(found.double(), gradient.double(), rtol=0, atol=atol)


CASES = [(kind, labelled) for kind in TEACHERS for labelled in (False, True) if labelled or kind != "none"]


@pytest.mark.parametrize("block", [1, 2 * C, 2**18], ids=["item by item", "two items", "at once"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "labelled"), CASES)
def test_loss_and_gradient_are_those_of_autograd(kind, labelled, weight, block, monkeypatch):
    """With five logits beyond the classes: a padded vocabulary."""
    monkeypatch.setattr("hf_dis.teacher.targets.BLOCK_ELEMENTS", block)
    labels = torch.randint(C, (N,)) if labelled else None
    logits = student_logits(width=C + 5)
    teacher, target, log_probs = teacher_of(kind)
    loss, terms = exact_loss(logits, C, teacher, labels, TEMPERATURE, weight)
    assert ("kd_loss" in terms) == (kind != "none") and ("ce_loss" in terms) == labelled
    assert not any(term.requires_grad for term in terms.values())
    expected = reference(logits, target, log_probs, labels, weight)
    assert_is_reference(logits, loss, expected, 1e-12)
    for name, term in terms.items():
        alone = reference(logits, target, log_probs, labels, float(name == "ce_loss")).detach()
        torch.testing.assert_close(term, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize(("kind", "labelled"), CASES)
def test_narrow_logits_are_computed_in_float32(kind, labelled, dtype, atol):
    labels = torch.randint(C, (N,)) if labelled else None
    logits = student_logits(dtype=dtype)
    teacher, target, log_probs = teacher_of(kind, dtype=torch.float32)  # as a cache holds it
    loss, _ = exact_loss(logits, C, teacher, labels, TEMPERATURE, 0.3)
    assert loss.dtype == torch.float32
    expected = reference(logits, target, log_probs, labels, 0.3)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)  # only gradients are rounded further
    assert_is_reference(logits, loss, expected, atol)


def test_a_gradient_in_float16_neither_overflows_nor_vanishes():
    """A loss scale of 2^16 is infinite in float16; gradients of 1e-9 are zero in float16 before they are scaled."""
    logits = torch.zeros(2, C, dtype=torch.float16)
    logits[:, 0] = 20
    logits.requires_grad_()
    loss, _ = exact_loss(logits, C, None, torch.zeros(2, dtype=torch.long), 1.0, 0.0)
    (gradient,) = torch.autograd.grad(loss, logits, torch.full((2,), 2.0**16))
    expected = 2.0**16 * logits.detach().double().softmax(1)[:, 1:]
    torch.testing.assert_close(gradient[:, 1:].double(), expected, rtol=1e-2, atol=0)


def test_under_autocast_the_loss_stays_in_float32():
    logits, teacher = student_logits(dtype=torch.float32), torch.randn(N, C)
    expected, _ = exact_loss(logits, C, [teacher], None, TEMPERATURE, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = exact_loss(logits, C, [teacher], None, TEMPERATURE, 0.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("labels", [None, torch.arange(2, N + 2)], ids=["no labels", "labels"])
def test_masked_classes_have_no_part_in_it(labels):
    """Two classes that student and teacher mask, and of one item four more that the teacher masks alone."""
    logits, teacher = torch.randn(2, N, C, dtype=torch.float64)
    teacher[:, :2] = logits[:, :2] = -torch.inf
    teacher[3, 2:6] = -torch.inf
    logits.requires_grad_()
    loss, _ = exact_loss(logits, C, [teacher], labels, TEMPERATURE, 0.3)
    rest = logits.detach()[:, 2:].requires_grad_()
    log_probs = (teacher[:, 2:] / TEMPERATURE).log_softmax(1)
    log_student = (rest / TEMPERATURE).log_softmax(1)
    kd = TEMPERATURE**2 * (torch.special.xlogy(log_probs.exp(), log_probs.exp()) - log_probs.exp() * log_student).sum(
        1
    )
    expected = kd
    if labels is not None:
        expected = 0.7 * kd + 0.3 * F.cross_entropy(rest, labels - 2, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert (gradient[:, :2] == 0).all()
    torch.testing.assert_close(gradient[:, 2:], *torch.autograd.grad(expected.sum(), rest), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "stored"])
def test_a_class_that_the_student_masks_alone_has_no_gradient(kind):
    """The divergence is as large as a number gets; the gradients of the other classes are τ (s - p)."""
    logits = student_logits().detach()
    teacher, target, _ = teacher_of(kind)
    masked = target.argmax(1, keepdim=True)
    logits.scatter_(1, masked, -torch.inf).requires_grad_()
    loss, _ = exact_loss(logits, C, teacher, None, TEMPERATURE, 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = TEMPERATURE * ((logits.detach() / TEMPERATURE).softmax(1) - target).scatter(1, masked, 0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert (loss > 1e300).all()


def test_a_gradient_in_bfloat16_is_scaled_in_float32():
    logits, teacher, factors = student_logits(dtype=torch.bfloat16), [torch.randn(N, C)], torch.rand(N)
    gradients = []
    for factor in (torch.ones(N), factors):
        loss, _ = exact_loss(logits, C, teacher, None, TEMPERATURE, 0.0)
        gradients += torch.autograd.grad(loss, logits, factor)
    assert torch.equal(gradients[1], (gradients[0].float() * factors[:, None]).bfloat16())


@pytest.mark.parametrize(("kind", "labelled"), CASES)
def test_no_items_have_no_loss_and_an_empty_gradient(kind, labelled):
    logits = student_logits(0)
    labels = torch.empty(0, dtype=torch.long) if labelled else None
    loss, terms = exact_loss(logits, C, teacher_of(kind, 0)[0], labels, TEMPERATURE, 0.3)
    assert loss.shape == (0,) and all(term.shape == (0,) for term in terms.values())
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.shape == (0, C)


def test_a_second_backward_raises():
    """The gradient is scaled in place, so that a second pass would scale it twice."""
    logits = student_logits()
    loss, _ = exact_loss(logits, C, *teacher_of("dense")[:1], None, TEMPERATURE, 0.0)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice: its gradient is kept for one backward pass"):
        loss.sum().backward()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        loss, _ = exact_loss(logits, C, *teacher_of("dense")[:1], None, TEMPERATURE, 0.0)
        factor = torch.ones(N, dtype=torch.float64, requires_grad=True)
        torch.autograd.grad(loss, logits, factor, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
def test_the_sampled_loss_with_all_classes_is_this_loss(labelled):
    logits, labels = student_logits(), torch.randint(C, (N,)) if labelled else None
    teacher = torch.randn(N, C, dtype=torch.float64)
    sampler = make_sampler(C, SamplerSpec(num_sampled_classes=C, num_shared_classes=0))
    sample = sampler.sample([TeacherTargets(teacher, TEMPERATURE, C)], labels)
    sampled, _, _ = sampled_loss(logits.gather(1, sample.item_ids), sample, TEMPERATURE, 0.3)
    exact, _ = exact_loss(logits, C, [teacher], labels, TEMPERATURE, 0.3)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (sampled, exact)]
    torch.testing.assert_close(sampled, exact, rtol=0, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
@pytest.mark.parametrize("kind", TEACHERS)
def test_the_divergence_at_temperature_1_as_far_as_it_is_known(kind, temperature, dense_kd):
    logits, teacher = student_logits().detach(), torch.randn(N, C, dtype=torch.float64)
    answer = [teacher] if kind == "dense" else teacher_of(kind)[0]
    terms = exact_losses(logits.__getitem__, N, 2, C, answer, torch.arange(N), temperature, with_kl=True)
    assert ("kl" in terms) == (kind == "dense" or (kind == "stored" and temperature == 1))
    if kind == "dense":
        torch.testing.assert_close(terms["kl"], dense_kd(logits, teacher, 1.0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(terms["kd_loss"], dense_kd(logits, teacher, temperature), rtol=1e-12, atol=1e-12)


# Memory


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_student_is_asked_for_no_more_than_a_block(kind):
    """Also where stored targets of all items come as one chunk."""
    logits, labels = student_logits().detach(), torch.arange(N)
    teacher, target, log_probs = teacher_of(kind)
    asked = []

    def student(items):
        asked.append(items)
        return logits[items]

    terms = exact_losses(student, N, 3, C, teacher, labels, TEMPERATURE)
    assert max(items.stop - items.start for items in asked) == 3
    assert [item for items in asked for item in range(N)[items]] == list(range(N))
    for name in terms:
        expected = reference(logits, target, log_probs, labels, float(name == "ce_loss"))
        torch.testing.assert_close(terms[name], expected, rtol=1e-12, atol=1e-12)


def test_one_chunk_of_the_teacher_lives_at_a_time():
    alive = []

    def chunks():
        for _ in range(3):
            assert not any(reference() is not None for reference in alive)
            chunk = torch.randn(2, C)
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk

    exact_loss(student_logits(6, dtype=torch.float32), C, chunks(), torch.arange(6), TEMPERATURE, 0.3)
    assert len(alive) == 3


def materialised(logits, teacher, labels):
    student, teacher = ((values.float() / TEMPERATURE).log_softmax(1) for values in (logits, teacher))
    kd = TEMPERATURE**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return 0.7 * kd + 0.3 * F.cross_entropy(logits.float(), labels, reduction="none")


def in_blocks(logits, teacher, labels):
    return exact_loss(logits, logits.shape[1], [teacher], labels, TEMPERATURE, 0.3)[0]


def peak(loss_of, num_items, num_classes, device, dtype):
    """Bytes of product, loss and backward at the highest, beyond the logits and their gradient."""
    with fake_cuda() as counts:  # tensors without values: of any size
        features, weight = (
            torch.empty(size, 8, device=device, dtype=dtype, requires_grad=True) for size in (num_items, num_classes)
        )
        teacher = torch.empty(num_items, num_classes, device=device, dtype=dtype)
        labels = torch.empty(num_items, device=device, dtype=torch.long)
        counts.start()
        loss_of(features @ weight.T, teacher, labels).mean().backward()
        return counts.peak(device) - 2 * teacher.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("device", "num_items", "num_classes"), [("cpu", 1_024, 32_000), ("cuda", 8_192, 151_936)], ids=["cpu", "cuda"]
)
def test_memory_beyond_the_logits_and_their_gradient_is_a_tenth_of_the_materialised_loss(
    device, num_items, num_classes, dtype
):
    size = num_items, num_classes
    least = peak(materialised, *size, "cpu", dtype)  # autograd's own order of freeing
    assert least >= 1.9 * num_items * num_classes * dtype.itemsize  # the measurement sees [N, C] tensors
    assert peak(in_blocks, *size, device, dtype) <= 0.1 * least
