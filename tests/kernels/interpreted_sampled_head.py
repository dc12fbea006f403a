"""Logits, loss and gradients by one kernel, against float64. Run by test_kernels.py in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.fused import sampled_head as fused
from hf_dis.fused.sampled_head import is_fused, mean_loss
from hf_dis.fused.triton_sampled_head import CACHED_BYTES, sampled_head, scaled_sum
from hf_dis.head.sampled_linear import sampled_columns
from hf_dis.loss.divergence import FORWARD_KL, ForwardKL
from hf_dis.loss.f_divergence import JensenShannon
from hf_dis.sampling.designs import Updates
from hf_dis.sampling.tails import by_item, by_tail

TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
]
# Items, classes, width, classes per item, tails and classes per tail: blocks are of 32 classes of an item, 128 columns
# and 1,024 classes of a tail.
SHAPES = [
    (1, 3, 1, 1, 1, 1),
    (5, 11, 5, 17, 2, 3),
    (4, 40, 300, 35, 2, 7),
    (2, 1040, 3, 2, 1, 1030),
    (2, 9, 128, 4, 4, 3),
    (3, 7, 3, 4, 1, 0),
]

SHARE = 0.25  # of cross-entropy; the interpreter rounds numbers to float32


def case(shape, types=(torch.float32, torch.float32)):
    """Features, weight and a labelled sample: duplicates, columns not used, classes that the teacher masks."""
    num_items, num_classes, width, num_own, num_tails, num_shared = shape
    features = torch.randn(num_items, width).to(types[0]).requires_grad_()
    weight = (torch.randn(num_classes, width) / width**0.5).to(types[1]).requires_grad_()
    item_ids = torch.randint(num_classes, (num_items, num_own))
    tail_ids = torch.stack([torch.randperm(num_classes)[:num_shared].sort().values for _ in range(num_tails)])
    columns, wide = (num_items, num_own + num_shared), torch.promote_types(types[0], torch.float32)
    log_weights, log_probs = torch.rand(columns, dtype=wide), torch.randn(columns, dtype=wide)
    log_weights[:, 1::4] = log_probs[:, 3::5] = -torch.inf
    log_weights[:, num_own - 1], log_probs[:, num_own - 1] = 0, -1.0
    target = (log_probs + log_weights).softmax(1)
    columns = {"log_weights": log_weights, "log_probs": log_probs, "target": target}
    return (
        features,
        weight,
        SimpleNamespace(item_ids=item_ids, tail_ids=tail_ids, updates=None, has_label=True, **columns),
    )


def by_definition(features, weight, sample, temperature, hard_label_weight, times):
    """The mean loss in float64, from the logits of all classes, and the signal."""
    logits = sampled_columns(features @ weight.T, sample.item_ids, sample.tail_ids[: len(features)])
    log_weights, log_probs, target = (one.double() for one in (sample.log_weights, sample.log_probs, sample.target))
    log_student = logits / temperature - (logits / temperature + log_weights).logsumexp(1, keepdim=True)
    kd = times * torch.where(target > 0, target * (log_probs - log_student), 0).sum(1)
    ce = (logits + log_weights).logsumexp(1) - logits[:, sample.item_ids.shape[1] - 1]
    signal = log_student.exp() - log_probs.exp()
    return ((1 - hard_label_weight) * kd + hard_label_weight * ce).mean(), signal.detach()


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_those_of_float64(shape, types):
    check(shape, types, FORWARD_KL)


def test_the_factor_of_the_temperature_may_be_left_out():
    check(SHAPES[1], TYPES[0], ForwardKL(scale_by_temperature=False))


def check(shape, types, divergence):
    features, weight, sample = case(shape, types)
    inputs = [features, weight] if shape[1] < 1000 else [features]  # the interpreter takes a second per 100 rows
    weight.requires_grad_(len(inputs) == 2)
    wide = [one.detach().double().requires_grad_() for one in (features, weight)]
    times = 4.0 if divergence.scale_by_temperature else 1.0
    expected, signal = by_definition(*wide, sample, 2.0, SHARE, times)
    (3 * expected).backward()
    found, found_signal, finite = mean_loss(features, weight, sample, 2.0, SHARE, divergence, False)
    (3 * found).backward()
    eps = max(torch.finfo(torch.promote_types(*types)).eps, torch.finfo(types[0]).eps)
    close = {"rtol": 40 * eps, "atol": 40 * eps}
    torch.testing.assert_close(found.double(), expected.detach(), **close)
    torch.testing.assert_close(found_signal.double(), signal, **close)
    assert finite.all() and not found_signal.requires_grad
    for one, other in zip(inputs, wide, strict=False):
        assert one.grad.dtype == one.dtype
        eps = max(eps, torch.finfo(one.dtype).eps)
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=20 * eps * scale)


@pytest.mark.parametrize("updates", [None, Updates(6, 0.4)], ids=["all update", "some update"])
def test_a_sparse_gradient_holds_the_rows_that_update(updates):
    gradients = []
    for row_sparse in (False, True):
        torch.manual_seed(3)
        features, weight, sample = case((5, 31, 5, 4, 2, 3))
        sample.updates = updates
        mean_loss(features, weight, sample, 2.0, SHARE, FORWARD_KL, row_sparse)[0].backward()
        gradients.append(weight.grad)
    dense, sparse = gradients
    assert sparse.is_sparse
    assert sparse._nnz() == 6 if updates else sparse._nnz() > 6
    assert torch.equal(sparse.to_dense(), dense)


def test_a_weight_without_a_gradient_is_left_alone():
    features, weight, sample = case((5, 11, 5, 4, 2, 3))
    mean_loss(features, weight.detach(), sample, 2.0, SHARE, FORWARD_KL, False)[0].backward()
    assert weight.grad is None and features.grad.abs().sum() > 0


def test_a_class_that_does_not_exist_gives_nan_in_its_item_alone():
    features, weight, sample = case((3, 9, 5, 4, 1, 3))
    sample.item_ids[1, 0] = 9
    given = features.detach(), weight.detach(), sample.item_ids, torch.zeros(1, 3, 3)
    loss, _, _, own, finite = sampled_head(
        *given, sample.log_weights, sample.log_probs, sample.target, 2.0, 4.0, SHARE
    )
    assert loss.isnan().tolist() == own.isnan().all(1).tolist() == [False, True, False]
    assert finite.tolist() == [True, False, True]


def test_memory_may_be_strided():
    features, weight, sample = case((5, 11, 6, 4, 2, 3))
    columns = sample.log_weights, sample.log_probs, sample.target
    given = features.detach(), weight.detach(), sample.item_ids, torch.randn(2, 3, 3), *columns
    strided = [one.mT.contiguous().mT for one in given]
    assert not any(one.is_contiguous() for one in strided)
    for one, other in zip(sampled_head(*given, 2.0, 4.0, SHARE), sampled_head(*strided, 2.0, 4.0, SHARE), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [5, 1030])
def test_parts_are_added_and_scaled(width, dtype):
    own, tails = torch.randn(5, width).bfloat16(), by_tail(torch.randn(5, width).bfloat16(), 2)
    expected = (own.double() + by_item(tails, 5).double()) * 0.3
    found = scaled_sum(own, tails, torch.tensor(0.3), dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_operations_are_well_formed():
    features, weight, sample = case((5, 11, 5, 4, 2, 3))
    columns = sample.log_weights, sample.log_probs, sample.target
    given = features.detach(), weight.detach(), sample.item_ids, torch.randn(2, 3, 3), *columns
    opcheck(sampled_head, (*given, 2.0, 4.0, SHARE))
    opcheck(scaled_sum, (torch.randn(5, 3), torch.randn(2, 3, 3), torch.tensor(2.0), torch.bfloat16))


# Where the kernel serves


def served(bias=None, divergence=FORWARD_KL, shape=(5, 11, 5, 4, 2, 3), dtype=torch.float32, **of):
    features, weight, sample = case(shape, (dtype, torch.float32))
    vars(sample).update(of)
    return is_fused(features, weight, bias, sample, divergence)


def test_a_head_and_a_sample_that_the_kernel_serves():
    num_own = CACHED_BYTES // (5 * 4)
    assert served() and served(shape=(5, 11, 5, num_own, 1, 3))
    assert not served(shape=(5, 11, 5, num_own + 1, 1, 3))
    assert not served(bias=torch.zeros(11))
    assert not served(divergence=JensenShannon())
    assert not served(dtype=torch.float16) and served(dtype=torch.bfloat16)
    assert not served(has_label=False)
    features, weight, sample = case((5, 11, 5, 4, 2, 3))
    assert not is_fused(features.detach(), weight, None, sample, FORWARD_KL)
    assert not is_fused(features[:0], weight, None, sample, FORWARD_KL)
    with torch.no_grad():
        assert not is_fused(features, weight, None, sample, FORWARD_KL)


def test_without_the_kernels_it_does_not_serve(monkeypatch):
    monkeypatch.setenv("HF_DIS_KERNELS", "torch")
    assert not served()


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_loss_without_a_model_takes_it(has_bias, monkeypatch):
    calls, own = [], fused.mean_loss
    monkeypatch.setattr("hf_dis.dis_loss.mean_loss", lambda *args: calls.append(args) or own(*args))
    weight, features = torch.randn(40, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    sampler = make_sampler(40, SamplerSpec(num_sampled_classes=4, num_shared_classes=8, rank_depth=8))
    bias = torch.zeros(40) if has_bias else None
    loss = DISLoss(sampler)(features, weight, bias, torch.randn(6, 40), torch.randint(40, (6,)))
    assert loss.dim() == 0 and len(calls) == (not has_bias)
