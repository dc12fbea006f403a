"""The exact loss from the head's input: value and every gradient against dense float64 autograd, and its memory."""

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda

from hf_dis.loss.exact_head import Gradients, HeadInput, HeadLoss
from hf_dis.loss.objective import Objective
from hf_dis.models.after_head import AfterHead
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import compact_targets

N, C, V, D, TEMPERATURE = 7, 23, 28, 5, 2.0
TEACHERS = ["dense", "stored", "none"]
AFTER = {"nothing": AfterHead(), "scale": AfterHead(scale=3.0), "soft cap": AfterHead(scale=0.5, soft_cap=2.0)}


def head_of(after_head=AFTER["nothing"], has_bias=True, num_items=N, dtype=torch.float64, product=None):
    """A head of V outputs, C of which are classes: a padded vocabulary."""
    shapes = (num_items, D), (V, D), (V,)
    features, weight, bias = (torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes)
    return HeadInput(features, weight, bias if has_bias else None, product or dtype, after_head)


def teacher_of(kind, num_items=N):
    """The teacher's answers in chunks of a different size than blocks, and target and log-probabilities, dense."""
    logits, size = 3 * torch.randn(num_items, C, dtype=torch.float64), max(1, num_items - 2)
    if kind == "none":
        return None, None, None
    if kind == "dense":
        log_probs = (logits / TEMPERATURE).log_softmax(1)
        return logits.split(size), log_probs.exp(), log_probs
    compact = compact_targets(logits, TEMPERATURE, 4, 6, torch.Generator().manual_seed(0))
    stored = CachedTargets(compact, C)
    target = torch.zeros(num_items, C).double().scatter_add_(1, stored.ids, stored.target.double())
    log_probs = torch.zeros(num_items, C).double().scatter_(1, stored.ids, stored.log_probs.double())
    parts = zip(*(part.split(size) for part in compact), strict=True)
    return [CachedTargets(type(compact)(*part), C) for part in parts], target, log_probs


def loss_of(head, teacher, labels, weight=0.3):
    exact = HeadLoss(head, Objective(C, labels, TEMPERATURE, weight), lambda: teacher)
    exact.add_all(teacher)
    return exact.result()


def reference(head, target, log_probs, labels, weight=0.3):
    """(1 - λ) τ² Σ p (log p - log s) + λ CE by autograd, on the first C logits."""
    logits = head.after_head(F.linear(*head.parameters))[:, :C]
    ce = None if labels is None else F.cross_entropy(logits, labels, reduction="none")
    if target is None:
        return ce
    kd = TEMPERATURE**2 * (target * (log_probs - (logits / TEMPERATURE).log_softmax(1))).sum(1)
    return kd if ce is None else (1 - weight) * kd + weight * ce


def gradients(head, loss, factors):
    wanted = [value for value in head.parameters if value is not None and value.requires_grad]
    return torch.autograd.grad(loss, wanted, factors)


def assert_is_reference(head, loss, expected, factors, tolerance=1e-12):
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(gradients(head, loss, factors), gradients(head, expected, factors), strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


CASES = [(kind, labelled) for kind in TEACHERS for labelled in (False, True) if labelled or kind != "none"]


@pytest.mark.parametrize("block", [1, 2 * C * 8, 2**24], ids=["item by item", "two items", "at once"])
@pytest.mark.parametrize("after_head", AFTER.values(), ids=AFTER)
@pytest.mark.parametrize(("kind", "labelled"), CASES)
def test_loss_and_gradients_are_those_of_autograd(kind, labelled, after_head, block, monkeypatch):
    monkeypatch.setattr("hf_dis.loss.exact_head.BLOCK_BYTES", block)
    labels = torch.randint(C, (N,)) if labelled else None
    teacher, target, log_probs = teacher_of(kind)
    head = head_of(after_head, has_bias=labelled)
    loss, terms = loss_of(head, teacher, labels)
    assert ("kd_loss" in terms) == (kind != "none") and ("ce_loss" in terms) == labelled
    assert not any(term.requires_grad for term in terms.values())
    expected = reference(head, target, log_probs, labels)
    assert_is_reference(head, loss, expected, torch.full((N,), 0.7).double())


@pytest.mark.parametrize("after_head", AFTER.values(), ids=AFTER)
@pytest.mark.parametrize("kind", TEACHERS)
def test_items_may_count_differently(kind, after_head, monkeypatch):
    """The gradient of the weight is a sum over items: it is computed again, with the factors."""
    monkeypatch.setattr("hf_dis.loss.exact_head.BLOCK_BYTES", 2 * C * 8)
    labels, (teacher, target, log_probs) = torch.randint(C, (N,)), teacher_of(kind)
    head = head_of(after_head)
    loss, _ = loss_of(head, teacher, labels)
    expected = reference(head, target, log_probs, labels)
    assert_is_reference(head, loss, expected, torch.rand(N, dtype=torch.float64))


def test_items_that_count_alike_are_computed_once():
    (teacher, *_), asked = teacher_of("dense"), []
    head = head_of()
    for reduce in (torch.sum, torch.mean, lambda loss: loss[:0].sum() + 3 * loss.sum()):
        exact = HeadLoss(head, Objective(C, None, TEMPERATURE), lambda: asked.append(True))
        exact.add_all(teacher)
        reduce(exact.result()[0]).backward()
    assert not asked


@pytest.mark.parametrize("trained", [("features",), ("weight",), ("bias",), ("features", "bias")], ids=" ".join)
def test_what_is_frozen_gets_no_gradient(trained):
    teacher, target, log_probs = teacher_of("dense")
    head = head_of()
    for name in ("features", "weight", "bias"):
        getattr(head, name).requires_grad_(name in trained)
    loss, _ = loss_of(head, teacher, None)
    assert_is_reference(head, loss, reference(head, target, log_probs, None), torch.ones(N).double())
    loss_of(head, teacher, None)[0].sum().backward()
    assert [name for name in ("features", "weight", "bias") if getattr(head, name).grad is not None] == list(trained)


def test_without_gradient_there_is_no_graph():
    teacher, target, log_probs = teacher_of("dense")
    head = head_of()
    with torch.no_grad():
        loss, _ = loss_of(head, teacher, None)
        torch.testing.assert_close(loss, reference(head, target, log_probs, None))
    assert not loss.requires_grad


@pytest.mark.parametrize(("kind", "labelled"), CASES)
def test_no_items_have_no_loss_and_gradients_of_zero(kind, labelled):
    head = head_of(num_items=0)
    labels = torch.empty(0, dtype=torch.long) if labelled else None
    loss, terms = loss_of(head, teacher_of(kind, 0)[0], labels)
    assert loss.shape == (0,) and all(term.shape == (0,) for term in terms.values())
    loss.sum().backward()
    assert all(value.grad.shape == value.shape and not value.grad.any() for value in head.parameters)


def test_masked_classes_have_no_part_in_it():
    """Two classes that student and teacher mask."""
    head, teacher = head_of(), torch.randn(N, C, dtype=torch.float64)
    teacher[:, :2] = -torch.inf
    with torch.no_grad():
        head.bias[:2] = -torch.inf
    loss, _ = loss_of(head, [teacher], None)
    found = gradients(head, loss.sum(), None)
    log_probs = (teacher[:, 2:] / TEMPERATURE).log_softmax(1)
    log_student = (F.linear(*head.parameters)[:, 2:C] / TEMPERATURE).log_softmax(1)
    expected = TEMPERATURE**2 * (log_probs.exp() * (log_probs - log_student)).sum(1)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(found, gradients(head, expected.sum(), None), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_bfloat16_sums_are_taken_in_float32(dtype, monkeypatch):
    """64 blocks of one item: the gradients are as good as those of a single block."""
    monkeypatch.setattr("hf_dis.loss.exact_head.BLOCK_BYTES", C * 2)
    head = head_of(num_items=64, dtype=dtype, product=torch.bfloat16)
    teacher, target, log_probs = teacher_of("dense", 64)
    loss, _ = loss_of(head, [part.float() for part in teacher], None)
    assert loss.dtype == torch.float32
    wide = head._replace(
        **{name: getattr(head, name).detach().bfloat16().double().requires_grad_() for name in HeadInput._fields[:3]}
    )
    expected = reference(wide, target, log_probs, None)
    torch.testing.assert_close(loss.double(), expected, rtol=0.05, atol=0.05)
    found = gradients(head, loss.sum(), None)
    assert all(one.dtype == dtype for one in found)
    for one, other in zip(found, gradients(wide, expected.sum(), None), strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("answered", [N - 1, N + 1, 2 * N])
def test_a_teacher_of_other_items_is_refused(answered):
    """The gradient of an item without an answer would be what was in memory before."""
    with pytest.raises(ValueError, match=f"targets of {answered} items.* the student has logits of {N}"):
        loss_of(head_of(), [torch.randn(answered, C)], None)


def test_a_block_is_as_large_whatever_the_chunks_of_the_teacher(monkeypatch):
    """The product with the head is as slow for few items as for many."""
    monkeypatch.setattr("hf_dis.loss.exact_head.BLOCK_BYTES", 3 * C * 8)
    opened, own = [], HeadLoss._open
    monkeypatch.setattr(HeadLoss, "_open", lambda loss, items: opened.append(items) or own(loss, items))
    loss_of(head_of(), torch.randn(N, C).split(1), None)
    assert opened == [slice(0, 3), slice(3, 6), slice(6, 7)]


def test_a_second_backward_raises():
    teacher, *_ = teacher_of("dense")
    loss, _ = loss_of(head_of(), teacher, None)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice: its gradient is kept for one backward pass"):
        loss.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "hip", "launches"),
    [(torch.float32, None, 2), (torch.bfloat16, None, 2), (torch.float64, None, 8), (torch.float32, "6.4", 8)],
    ids=str,
)
def test_products_of_an_nvidia_device_are_written_in_float32(dtype, hip, launches, monkeypatch):
    """Other types, and other devices, add the product of some rows at a time to a sum of a wider type."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("hf_dis.loss.exact_head.ADDED_ELEMENTS", 20 * 64)  # 3 parts of 50 classes
    with fake_cuda() as counts:
        features, weight = (torch.empty(size, 64, device="cuda", dtype=dtype, requires_grad=True) for size in (8, 50))
        head = HeadInput(features, weight, None, torch.bfloat16)
        gradients, slopes = Gradients(head, 50, True), torch.empty(8, 50, device="cuda", dtype=torch.bfloat16)
        used = head.detached(50)
        gradients.add(slice(0, 8), slopes, used)  # the first one is written, not added
        counts.start()
        gradients.add(slice(0, 8), slopes, used)
    assert gradients.features.dtype == dtype and gradients.weight.dtype == torch.promote_types(dtype, torch.float32)
    assert sum(counts.launches.values()) == launches


# Memory


def peak(num_items, num_classes, num_features, device, product, dtype=torch.float32):
    """Bytes of loss and backward at the highest, beyond features, weight and the gradient of the weight."""
    with fake_cuda() as counts:  # tensors without values: of any size
        features = torch.empty(num_items, num_features, device=device, requires_grad=True)
        weight = torch.empty(num_classes, num_features, device=device, requires_grad=True)
        block = torch.empty(512, num_classes, device=device, dtype=dtype)  # of the teacher, always the same
        labels = torch.empty(num_items, device=device, dtype=torch.long)
        counts.start()
        head = HeadInput(features, weight, None, product, AfterHead())
        exact = HeadLoss(head, Objective(num_classes, labels, TEMPERATURE, 0.3), lambda: None)
        for _ in range(num_items // len(block)):
            exact.add(block)
        loss, _ = exact.result()
        del exact
        loss = loss.sum()
        loss.backward()
        return counts.peak(device) - weight.nbytes


def test_on_an_accelerator_it_takes_less_than_15_gb_for_a_language_model():
    found = peak(8_192, 151_936, 2_048, "cuda", torch.bfloat16, torch.bfloat16)
    assert 0.6e9 < found < 1.5e9  # the weight in bfloat16 is among it


@pytest.mark.parametrize(
    ("device", "product", "num_items"),
    [
        pytest.param("cpu", torch.float32, 4_096, marks=pytest.mark.slow, id="cpu"),
        pytest.param("cuda", torch.bfloat16, 16_384, id="cuda"),  # blocks of one size, and close to the largest
    ],
)
def test_memory_does_not_grow_with_the_items(device, product, num_items):
    """But by the gradient of the features, and a number per item."""
    once, twice = (peak(size, 50_000, 64, device, product) for size in (num_items, 2 * num_items))
    assert twice - once <= num_items * (2 * 64 * 4 + 64)
    assert once > 1_000_000
