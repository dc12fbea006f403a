"""Logits, loss and gradients by one kernel, against float64. Run by test_kernels.py in Triton's interpreter."""

from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.fused import sampled_head as fused
from hf_dis.fused.sampled_head import is_fused, mean_loss
from hf_dis.fused.triton_sampled_head import CACHED_BYTES, sampled_head
from hf_dis.fused.triton_tails_gradient import tails_gradient
from hf_dis.head.sampled_linear import sampled_columns
from hf_dis.loss.divergence import FORWARD_KL, ForwardKL
from hf_dis.loss.f_divergence import JensenShannon
from hf_dis.sampling.designs import Updates
from hf_dis.sampling.sample import estimated_target, normalised
from hf_dis.teacher.targets import TeacherTargets

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
    wide = torch.promote_types(types[0], torch.float32)
    log_weights = torch.rand(num_items, num_own, dtype=wide)
    log_probs = torch.randn(num_items, num_own + num_shared, dtype=wide) - 3
    log_weights[:, 1::4] = log_probs[:, 3::5] = -torch.inf
    log_weights[:, num_own - 1], log_probs[:, num_own - 1] = 0, -1.0
    inclusion = torch.rand(num_tails, num_shared, dtype=torch.float64) * 0.8 + 0.2
    inclusion[:, ::3] = 1
    own, shared = log_probs.split([num_own, num_shared], 1)
    sample = SimpleNamespace(
        item_ids=item_ids,
        tail_ids=tail_ids,
        log_weights=log_weights,
        log_probs=own,
        target=(own + log_weights).softmax(1) * 0.7,
        held_ids=item_ids[:, : num_own - 1],
        inclusion=inclusion,
        tail_log_probs=shared,
        tail_mass=torch.rand(num_items, dtype=wide),
        updates=None,
    )
    return features, weight, sample


def whole(sample):
    """Log-weights, log-probabilities and targets of all columns, by plain torch in float64."""
    tails = torch.arange(len(sample.item_ids)) % len(sample.tail_ids)
    tail_ids, inclusion = sample.tail_ids[tails], sample.inclusion[tails].double()
    held = torch.cat([sample.held_ids, sample.item_ids[:, -1:]], 1)
    log_weights = (-inclusion.log()).masked_fill((tail_ids[:, :, None] == held[:, None]).any(2), -torch.inf)
    log_probs, mass = sample.tail_log_probs.double(), sample.tail_mass.double()[:, None]
    target = estimated_target(log_probs, log_weights, inclusion >= 1, mass)
    own = (one.double() for one in (sample.log_weights, sample.log_probs, sample.target))
    log_weights, log_probs, target = (
        torch.cat(both, 1) for both in zip(own, (log_weights, log_probs, target), strict=True)
    )
    return log_weights, log_probs, normalised(target)


def by_definition(features, weight, sample, temperature, hard_label_weight, times):
    """The mean loss in float64, from the logits of all classes, and the signal."""
    logits = sampled_columns(features @ weight.T, sample.item_ids, sample.tail_ids[: len(features)])
    log_weights, log_probs, target = whole(sample)
    log_student = logits / temperature - (logits / temperature + log_weights).logsumexp(1, keepdim=True)
    kd = times * torch.where(target > 0, target * (log_probs - log_student), 0).sum(1)
    ce = (logits + log_weights).logsumexp(1) - logits[:, sample.item_ids.shape[1] - 1]
    signal = log_student.exp() - log_probs.exp()
    return ((1 - hard_label_weight) * kd + hard_label_weight * ce).mean(), signal.detach()


def arguments(features, weight, sample, tails):
    """Those of the kernel."""
    of_items = [sample.log_weights, sample.log_probs, sample.target]
    of_tails = [sample.tail_ids, sample.inclusion, sample.tail_log_probs, sample.tail_mass]
    return features.detach(), weight.detach(), sample.item_ids, of_items, tails, of_tails, sample.held_ids


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
    given = arguments(features, weight, sample, torch.zeros(1, 3, 3))
    loss, *_, own, finite = sampled_head(*given, 2.0, 4.0, SHARE)
    assert loss.isnan().tolist() == own.isnan().all(1).tolist() == [False, True, False]
    assert finite.tolist() == [True, False, True]


def test_memory_may_be_strided():
    given = arguments(*case((5, 11, 6, 4, 2, 3)), torch.randn(2, 3, 3))
    strided = [list(map(apart, one)) if isinstance(one, list) else apart(one) for one in given]
    for one, other in zip(sampled_head(*given, 2.0, 4.0, SHARE), sampled_head(*strided, 2.0, 4.0, SHARE), strict=True):
        assert torch.equal(one, other)


def apart(values):
    """The same numbers, not side by side in memory."""
    strided = values.mT.contiguous().mT if values.dim() > 1 else torch.stack([values, values], 1)[:, 0]
    assert not strided.is_contiguous()
    return strided


# Items, tails, classes per tail and width: blocks are of 128 items of a tail, 128 columns, and 16 to 64 classes.
GRADIENTS = [(5, 2, 3, 5), (2, 4, 1, 1), (140, 1, 70, 3), (6, 3, 33, 130), (3, 1, 0, 4)]


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
def test_the_gradient_of_the_tails_is_added_and_scaled(shape, dtype, result):
    num_items, num_tails, num_shared, width = shape
    scales, own = torch.randn(num_items, num_shared + 2).to(dtype)[:, 2:], torch.randn(num_items, width).to(dtype)
    rows = torch.randn(num_tails, num_shared, width).to(dtype)
    of_item = rows.double()[torch.arange(num_items) % num_tails]
    expected = 0.25 * (own.double() + (scales.double()[:, :, None] * of_item).sum(1))
    found = tails_gradient(scales, rows, own, torch.tensor(0.25), result)
    assert found.dtype == result
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_operations_are_well_formed():
    opcheck(sampled_head, (*arguments(*case((5, 11, 5, 4, 2, 3)), torch.randn(2, 3, 3)), 2.0, 4.0, SHARE))
    rows, factor = torch.randn(2, 4, 3), torch.tensor(2.0)
    opcheck(tails_gradient, (torch.randn(5, 4), rows, torch.randn(5, 3), factor, torch.bfloat16))


# The sample


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("proposal", "depth", "num_shared"), [("dis", 4, 8), ("dis", 9, 8), ("teacher", 9, 8), ("dis", 4, 0)]
)
def test_a_sample_without_tails_is_that_with_all_columns(proposal, depth, num_shared, labelled):
    spec = SamplerSpec(
        num_sampled_classes=4, num_shared_classes=num_shared, num_tails=2 if num_shared else 1, rank_depth=depth,
        proposal=proposal, num_updated_classes=3,
    )  # fmt: skip
    first, second = (make_sampler(40, spec, seed=1) for _ in range(2))
    for _ in range(2):
        logits, labels = 3 * torch.randn(5, 40), torch.randint(40, (5,)) if labelled else None
        logits[0, ::3] = -torch.inf
        expected, found = (
            take([TeacherTargets(logits, 2.0, depth)], labels) for take in (first.sample, second.sample_without_tails)
        )
        for name in ("item_ids", "tail_ids", "ranks", "rank_weights", "class_mass"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        for name in ("has_label", "with_replacement", "all_ranks_certain", "updates"):
            assert getattr(found, name) == getattr(expected, name)
        if labelled:
            columns = expected.log_weights, expected.log_probs, expected.target
            for one, other in zip(whole(found), columns, strict=True):
                torch.testing.assert_close(one, other.double(), rtol=1e-4, atol=1e-5)
        finite, signal = torch.tensor([True, False, True, True, True]), torch.randn(expected.log_weights.shape)
        first.learn(expected, signal, None, finite)
        second.learn(found, signal, None, finite)
        for name, value in first.state_dict().items():
            torch.testing.assert_close(second.state_dict()[name], value)


# Where the kernel serves


def served(bias=None, divergence=FORWARD_KL, dtype=torch.float32, is_labelled=True, **of):
    features, weight = torch.randn(5, 5, dtype=dtype, requires_grad=True), torch.randn(11, 5)
    labels = torch.zeros(5, dtype=torch.long) if is_labelled else None
    sampler = SimpleNamespace(**{"num_sampled": 4, "leaves_tails": True} | of)
    return is_fused(features, weight, bias, labels, sampler, divergence)


def test_a_head_and_a_sampler_that_the_kernel_serves():
    most = CACHED_BYTES // (5 * 4)
    assert served() and served(num_sampled=most - 1) and not served(num_sampled=most)
    assert not served(bias=torch.zeros(11))
    assert not served(divergence=JensenShannon())
    assert not served(dtype=torch.float16) and served(dtype=torch.bfloat16)
    assert not served(is_labelled=False)
    assert not served(leaves_tails=False)
    features, weight = torch.randn(5, 5, requires_grad=True), torch.randn(11, 5)
    given = weight, None, torch.zeros(5), make_sampler(11), FORWARD_KL
    assert is_fused(features, *given)
    assert not is_fused(features.detach(), *given)
    assert not is_fused(features[:0], *given)
    with torch.no_grad():
        assert not is_fused(features, *given)


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
