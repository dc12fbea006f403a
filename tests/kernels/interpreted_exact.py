"""The loss on all classes against plain torch in float64. Run by test_kernels.py in Triton's interpreter."""

import pytest
import torch
from torch.library import opcheck

from hf_dis.loss import triton_exact, triton_exact_sums
from hf_dis.loss.divergence import ForwardKL
from hf_dis.loss.exact import exact_loss, exact_losses
from hf_dis.loss.exact_head import HeadInput, HeadLoss
from hf_dis.loss.f_divergence import JensenShannon, ReverseKL, SkewKL
from hf_dis.loss.objective import Objective
from hf_dis.models.after_head import AfterHead
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import compact_targets

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DIVERGENCES = [ForwardKL(), ForwardKL(False), ReverseKL(), JensenShannon(True, 0.25), SkewKL(True, 0.125)]
NAMES = [one.described for one in DIVERGENCES]
AFTER = {"nothing": AfterHead(), "scale": AfterHead(scale=3.0), "soft cap": AfterHead(scale=0.5, soft_cap=2.0)}
N, C, V, D = 5, 43, 48, 4


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """43 classes are three parts of 16, which are read by eight."""
    monkeypatch.setattr(triton_exact_sums, "PART", 16)
    monkeypatch.setattr(triton_exact_sums, "BLOCK", 8)


def close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# From the input of the head


def teacher_of(kind, masked=False):
    """The teacher's answers in two chunks, or None."""
    if kind == "none":
        return None
    logits = 3 * torch.randn(N, C, dtype=torch.float64)
    if masked:
        logits[:, 1::5] = -torch.inf
    if kind == "dense":
        return logits.split(3)
    compact = compact_targets(logits, 2.0, 4, 12, torch.Generator().manual_seed(0))
    return [CachedTargets(type(compact)(*part), C) for part in zip(*(one.split(3) for one in compact), strict=True)]


def of_head(kernels, values, teacher, labels, divergence, after_head, temperature, monkeypatch, factors=None):
    """Loss, terms and gradients of a head, in blocks of two items."""
    monkeypatch.setenv("HF_DIS_KERNELS", kernels)
    monkeypatch.setattr("hf_dis.loss.exact_head.BLOCK_BYTES", 2 * C * 8)
    given = [one.clone().requires_grad_() for one in values]
    objective = Objective(C, labels, temperature, 0.25, divergence)
    exact = HeadLoss(HeadInput(*given, given[0].dtype, after_head), objective, lambda: teacher)
    exact.add_all(teacher)
    loss, terms = exact.result()
    (loss.sum() if factors is None else (loss * factors).sum()).backward()
    return [loss.detach(), *terms.values(), *(one.grad for one in given)]


def head_values(dtype=torch.float64):
    return [torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((N, D), (V, D), (V,))]


@pytest.mark.parametrize(("after_head", "temperature"), [("nothing", 1.0), ("scale", 2.0), ("soft cap", 2.0)])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=NAMES)
def test_loss_and_gradients_are_those_of_plain_torch(divergence, labelled, after_head, temperature, monkeypatch):
    labels = torch.randint(C, (N,)) if labelled else None
    given = head_values(), teacher_of("dense"), labels, divergence, AFTER[after_head], temperature, monkeypatch
    close(of_head("triton", *given), of_head("torch", *given), 1e-12)


@pytest.mark.parametrize("after_head", AFTER.values(), ids=AFTER)
@pytest.mark.parametrize(
    ("kind", "divergence"), [("stored", ForwardKL()), ("stored", ForwardKL(False)), ("none", SkewKL())], ids=str
)
@pytest.mark.parametrize("labelled", [False, True])
def test_of_stored_targets_and_labels_alone(kind, divergence, labelled, after_head, monkeypatch):
    """Stored ones are float32."""
    labels = torch.randint(C, (N,)) if labelled or kind == "none" else None
    given = head_values(), teacher_of(kind), labels, divergence, after_head, 2.0, monkeypatch
    close(of_head("triton", *given), of_head("torch", *given), 1e-12 if kind == "none" else 1e-5)


def test_a_class_may_be_stored_more_than_once(monkeypatch):
    targets = teacher_of("stored")
    for part in targets:
        part.ids[:, 5] = part.ids[:, 2] = part.ids[:, 0]
    given = head_values(), targets, torch.randint(C, (N,)), ForwardKL(), AfterHead(), 2.0, monkeypatch
    close(of_head("triton", *given), of_head("torch", *given), 1e-5)


def test_more_stored_classes_than_a_program_compares(monkeypatch):
    given = head_values(), teacher_of("stored"), None, ForwardKL(), AfterHead(), 2.0, monkeypatch
    expected = of_head("torch", *given)
    monkeypatch.setattr(triton_exact, "MOST_STORED", 15)
    monkeypatch.setattr(triton_exact, "exact_terms", None)
    close(of_head("triton", *given), expected, 1e-5)


@pytest.mark.parametrize("kind", ["dense", "stored"])
def test_items_may_count_differently(kind, monkeypatch):
    given = head_values(), teacher_of(kind), torch.randint(C, (N,)), ForwardKL(), AFTER["soft cap"], 2.0, monkeypatch
    factors = torch.arange(1, N + 1).double()
    close(of_head("triton", *given, factors), of_head("torch", *given, factors), 1e-12 if kind == "dense" else 1e-5)


def test_the_products_of_bfloat16_are_near(monkeypatch):
    """The gradient takes the place of logits in bfloat16."""
    values, teacher = head_values(torch.bfloat16), [part.bfloat16() for part in teacher_of("dense")]
    rest = torch.randint(C, (N,)), ForwardKL(), AfterHead(), 2.0, monkeypatch
    found = of_head("triton", values, teacher, *rest)
    expected = of_head("torch", [one.double() for one in values], [part.double() for part in teacher], *rest)
    assert found[0].dtype == torch.float32 and all(one.dtype == torch.bfloat16 for one in found[3:])
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


# From logits


def of_logits(kernels, logits, teacher, labels, divergence, monkeypatch):
    """Loss and gradient of logits, whose last columns stand for nothing."""
    monkeypatch.setenv("HF_DIS_KERNELS", kernels)
    logits = logits.detach().requires_grad_()
    loss, terms = exact_loss(logits, teacher.shape[1], [teacher], labels, 2.0, 0.25, divergence)
    (loss * torch.arange(1, len(loss) + 1)).sum().backward()
    assert not logits.grad[:, teacher.shape[1] :].any()
    return [loss.detach(), *terms.values(), logits.grad]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=NAMES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (2, 16), (4, 33), (0, 5)], ids=str)
def test_all_types_and_ragged_shapes(shape, dtype, divergence, monkeypatch):
    """With ties, and classes that both mask; the label is none of them."""
    num_items, num_classes = shape
    logits = torch.randn(num_items, num_classes + 2).mul(2).round().to(dtype)
    teacher = torch.randn(num_items, num_classes).mul(2).round().to(dtype)
    logits[:, 1::6] = teacher[:, 1:num_classes:6] = -torch.inf
    logits[:, num_classes:] = 9
    labels = torch.full((num_items,), num_classes - 1 if num_classes % 6 != 2 else 0)
    found = of_logits("triton", logits, teacher, labels, divergence, monkeypatch)
    expected = of_logits("torch", logits.double(), teacher.double(), labels, divergence, monkeypatch)
    assert found[-1].dtype == dtype and found[0].dtype == torch.promote_types(dtype, torch.float32)
    close(found[:-1], expected[:-1], 1e-12 if dtype == torch.float64 else 1e-5)
    close(found[-1:], expected[-1:], {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=NAMES)
def test_memory_may_be_strided(divergence, monkeypatch):
    logits, teacher = torch.randn(C + 3, N).T, torch.randn(N, 2 * C)[:, ::2]
    given = torch.randint(C, (N,)), divergence, monkeypatch
    found = of_logits("triton", logits, teacher, *given)
    close(found, of_logits("torch", logits.double(), teacher.double(), *given), 1e-5)


@pytest.mark.parametrize("divergence", [ForwardKL(), SkewKL()], ids=lambda one: one.name)
def test_a_class_that_the_student_alone_masks_gets_no_gradient(divergence, monkeypatch):
    logits, teacher = torch.randn(3, 20), torch.randn(3, 20)
    logits[1, 4] = -torch.inf
    found, expected = (of_logits(name, logits, teacher, None, divergence, monkeypatch) for name in ("triton", "torch"))
    assert found[-1][1, 4] == 0
    close(found, expected, 1e-5)


def test_nan_is_told_and_stays_in_its_item(monkeypatch):
    """Also where a teacher masks all classes."""
    logits, teacher = torch.randn(4, 20), torch.randn(4, 20)
    logits[1, 17], teacher[2] = torch.nan, -torch.inf
    for divergence in DIVERGENCES:
        loss, _, gradient = of_logits("triton", logits, teacher, None, divergence, monkeypatch)
        assert loss.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon()], ids=lambda one: one.name)
def test_large_logits_do_not_overflow(divergence, monkeypatch):
    logits = torch.tensor([[3e4, -3e4, 2.9e4], [-6e4, -6e4, -6e4]])
    given = torch.tensor([1, 2]), divergence, monkeypatch
    found = of_logits("triton", logits, logits.flip(1), *given)
    expected = of_logits("torch", logits.double(), logits.double().flip(1), *given)
    close(found, expected, 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon()], ids=lambda one: one.name)
def test_without_gradient_and_at_temperature_one(divergence, temperature, monkeypatch):
    logits, teacher, labels = torch.randn(N, V).double(), torch.randn(N, C).double(), torch.randint(C, (N,))
    results = []
    for kernels in ("triton", "torch"):
        monkeypatch.setenv("HF_DIS_KERNELS", kernels)
        given = N, 3, C, teacher.split(2), labels, temperature
        results.append(exact_losses(logits.__getitem__, *given, with_kl=True, divergence=divergence))
    found, expected = ([terms[name] for name in sorted(terms)] for terms in results)
    assert results[0].keys() == results[1].keys()
    close(found, expected, 1e-12)


def test_a_divergence_without_kernels_is_computed_by_torch(monkeypatch):
    class Own(SkewKL):
        """A class of someone else."""

    monkeypatch.setattr(triton_exact, "exact_terms", None)
    logits, teacher = torch.randn(3, 20), torch.randn(3, 20)
    found, expected = (of_logits(name, logits, teacher, None, Own(), monkeypatch) for name in ("triton", "torch"))
    close(found, expected, 0)


def test_the_operations_are_well_formed():
    logits, teacher, labels = torch.randn(3, 20), torch.randn(3, 20), torch.randint(20, (3,))
    opcheck(triton_exact_sums.part_sums, (logits, teacher, 2.0, 1.0, 0.0, True, True))
    sums = triton_exact_sums.part_sums(logits, teacher, 2.0, 1.0, 0.0, True, True)
    opcheck(triton_exact_sums.mean_slopes, (logits, teacher, sums, 2.0, 1.0, 0.0, 1, 0.5))
    rest = None, sums, None, 0, [2.0, 1.0, 0.0, 0.5, 4.0, 1.0, 0.5]
    opcheck(triton_exact.exact_terms, (torch.empty(3, 20), logits, teacher, [], labels, *rest))
