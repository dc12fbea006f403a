"""The losses on sampled classes against plain torch in float64. Run by test_kernels.py in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

from hf_dis.loss.cross_entropy import sampled_cross_entropy
from hf_dis.loss.divergence import FORWARD_KL, ForwardKL, sampled_forward_kl
from hf_dis.loss.sampled import sampled_loss
from hf_dis.loss.triton_sampled import cross_entropy, forward_kl, mixture

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# A block is of 1,024 columns.
SHAPES = [(1, 1), (3, 7), (2, 1024), (2, 1030), (0, 5)]


def case(num_items, width, dtype=torch.float32):
    """Logits and a sample: columns not used, classes that the student or the teacher masks."""
    logits = (3 * torch.randn(num_items, width)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    log_weights, log_probs = torch.rand(num_items, width, dtype=wide), torch.randn(num_items, width, dtype=wide)
    log_weights[:, 1::4] = -torch.inf
    logits[:, 2::7] = log_probs[:, 2::7] = log_probs[:, 3::7] = -torch.inf
    target = (log_probs + log_weights).softmax(1)
    sample = SimpleNamespace(log_weights=log_weights, log_probs=log_probs, target=target, label_column=0)
    return logits, sample


def widened(sample):
    return SimpleNamespace(**{k: v.double() if torch.is_tensor(v) else v for k, v in vars(sample).items()})


def of(kernels, loss, logits, sample, monkeypatch, *more):
    """The results of a loss and the gradient of a weighted sum of items."""
    monkeypatch.setenv("HF_DIS_KERNELS", kernels)
    logits = logits.clone().requires_grad_()
    results = loss(logits, sample, *more)
    values = results if torch.is_tensor(results) else results.loss
    (values * torch.arange(1, len(values) + 1)).sum().backward()
    others = [] if torch.is_tensor(results) else [results.signal, results.log_student]
    assert not any(other.requires_grad for other in others)
    return [values.detach(), *others, logits.grad]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_divergence_is_that_of_float64(shape, dtype, temperature, monkeypatch):
    logits, sample = case(*shape, dtype)
    expected = of("torch", sampled_forward_kl, logits.double(), widened(sample), monkeypatch, temperature)
    found = of("triton", sampled_forward_kl, logits, sample, monkeypatch, temperature)
    check(found, expected, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cross_entropy_is_that_of_float64(shape, dtype, monkeypatch):
    logits, sample = case(*shape, dtype)
    expected = of("torch", sampled_cross_entropy, logits.double(), widened(sample), monkeypatch)
    check(of("triton", sampled_cross_entropy, logits, sample, monkeypatch), expected, dtype)


def check(found, expected, dtype):
    """Masked classes have the lowest number of their own type as log s."""
    wide, tolerance = (torch.float64, 1e-12) if dtype == torch.float64 else (torch.float32, 1e-4)
    *results, gradient = found
    assert {result.dtype for result in results} == {wide} and gradient.dtype == dtype
    for result, other in zip(results, expected, strict=False):
        is_lowest = other < -1e37
        assert torch.equal(result < -1e37, is_lowest)
        result, other = (values.double().masked_fill(is_lowest, 0) for values in (result, other))
        torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance)
    eps = max(tolerance, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient.double(), expected[-1].double(), rtol=eps, atol=eps)


def test_any_temperature_is_that_of_torch_to_rounding(monkeypatch):
    given = *case(3, 20), monkeypatch, 0.7
    check(of("triton", sampled_forward_kl, *given), of("torch", sampled_forward_kl, *given), torch.float32)


def test_the_lowest_log_probability_is_that_of_torch(monkeypatch):
    given = *case(3, 20), monkeypatch, 2.0
    assert of("triton", sampled_forward_kl, *given)[2].min() == of("torch", sampled_forward_kl, *given)[2].min()


def test_a_class_that_the_student_alone_masks_gets_no_gradient(monkeypatch):
    logits, sample = case(3, 7)
    logits[1, 4] = -torch.inf
    assert sample.target[1, 4] > 0
    found, expected = (of(name, sampled_forward_kl, logits, sample, monkeypatch, 2.0) for name in ("triton", "torch"))
    assert found[-1][1, 4] == 0
    check(found[1:], expected[1:], torch.float32)


def test_nan_is_told_and_stays_in_its_item(monkeypatch):
    logits, sample = case(3, 7)
    logits[1, 4] = torch.nan
    for loss, more in ((sampled_forward_kl, (2.0,)), (sampled_cross_entropy, ())):
        values, *_, gradient = of("triton", loss, logits, sample, monkeypatch, *more)
        assert values.isnan().tolist() == [False, True, False]
        assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_memory_may_be_strided(monkeypatch):
    """A view of wider rows, columns apart, and a row for all items."""
    logits, sample = case(3, 7)
    sample.log_weights = sample.log_weights[:1].expand(3, 7)
    expected = of("triton", sampled_forward_kl, logits, sample, monkeypatch, 2.0)
    sample.log_probs = torch.cat([sample.log_probs] * 2, 1)[:, 7:]
    sample.target = sample.target.T.contiguous().T
    found = of("triton", sampled_forward_kl, logits, sample, monkeypatch, 2.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    check(found, of("torch", sampled_forward_kl, logits, sample, monkeypatch, 2.0), torch.float32)


def test_the_operations_are_well_formed():
    logits, sample = case(3, 7)
    opcheck(forward_kl, (logits, sample.log_weights, sample.log_probs, sample.target, 2.0))
    opcheck(cross_entropy, (logits, sample.log_weights, 2))


# The mixture


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "divergence", [FORWARD_KL, ForwardKL(scale_by_temperature=False)], ids=["scaled", "not scaled"]
)
def test_a_mixture_is_that_of_float64(shape, dtype, divergence, monkeypatch):
    logits, sample = case(*shape, dtype)
    sample.has_label = True
    if shape[1] > 2:
        logits[:, 0] = 0  # the label's logit is finite
    results = []
    for name, one, of in (("torch", logits.double(), widened(sample)), ("triton", logits, sample)):
        monkeypatch.setenv("HF_DIS_KERNELS", name)
        one = one.clone().requires_grad_()
        loss, terms, result = sampled_loss(one, of, 2.0, 0.3, divergence)
        (loss * torch.arange(1, len(loss) + 1)).sum().backward()
        results.append((loss.detach(), *terms.values(), result.signal, result.log_student, one.grad))
        assert not any(value.requires_grad for value in terms.values()) and list(terms) == ["kd_loss", "ce_loss"]
    # The lowest number stands for -inf, and each type has its own.
    expected, found = ([value.double().clamp_min(-1e30) for value in one[:-1]] + [one[-1]] for one in results)
    assert found[-1].dtype == dtype
    for value, wanted in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[-1].double(), expected[-1], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_the_mixture_is_well_formed():
    logits, sample = case(3, 7)
    opcheck(mixture, (logits, sample.log_weights, sample.log_probs, sample.target, 0, 2.0, 4.0, 0.3))


def test_a_mixture_finds_the_items_with_a_finite_signal():
    """A column that an item does not use has no part, nor has what lies beyond the last column."""
    width = 1030  # a block is of 1,024 columns
    logits, log_weights = torch.zeros(5, width), torch.zeros(5, width)
    log_probs = torch.full((5, width), -float(torch.tensor(width).log()))
    logits[1:3, 1026] = 1e4  # its probability overflows where no other column bounds it
    log_weights[1, 1026] = -torch.inf
    logits[3, 2] = torch.nan
    log_probs[4, 1028] = torch.inf
    finite = mixture(logits, log_weights, log_probs, log_probs.exp(), 0, 2.0, 4.0, 0.3)[-1]
    assert finite.tolist() == [True, True, True, False, False]
