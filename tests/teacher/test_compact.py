"""Compact targets: ranked classes exactly, an unbiased tail, and every bit back from where it was put."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import TargetLayout, compact_targets, pack_integers, unpack_integers

C = 60


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(items=5, classes=C, spread=3.0):
    return spread * torch.randn(items, classes, generator=generator(1))


def test_what_is_ranked_is_the_teachers_own():
    t = logits()
    found = compact_targets(t, 2.0, 7, 9, generator())
    expected = (t.double() / 2).log_softmax(1)
    top, ids = expected.topk(7)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.log_probs.double(), top, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.log_tail_mass.double(), (1 - top.exp().sum(1)).log(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.entropy.double(), -(expected.exp() * expected).sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.log_normaliser.double(), (t.double() / 2).logsumexp(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("design", ["systematic", "independent"])
@pytest.mark.parametrize("depth", [0, 7])
def test_the_target_is_unbiased(design, depth):
    t, repeats = logits(items=2), 4000
    found = compact_targets(t.repeat_interleave(repeats, 0), 1.0, depth, 5, generator(), design)
    targets = CachedTargets(found, C)
    estimates = torch.zeros(2 * repeats, C).scatter_add_(1, targets.ids, targets.target).unflatten(0, (2, repeats))
    p = t.softmax(1)
    deviation = (p / 5 / repeats).sqrt()
    assert ((estimates.mean(1) - p).abs() <= 4.5 * deviation + 1e-4).all()


def test_a_systematic_sample_varies_less_than_an_independent_one():
    t = logits(items=1).expand(2000, C)
    variance = {}
    for design in ("systematic", "independent"):
        targets = CachedTargets(compact_targets(t, 1.0, 5, 12, generator(), design), C)
        variance[design] = torch.zeros(2000, C).scatter_add_(1, targets.ids, targets.target).var(0).sum()
    assert variance["systematic"] < 0.7 * variance["independent"]


def test_a_stored_class_is_never_a_ranked_one():
    found = compact_targets(logits(items=400), 1.0, 7, 9, generator())
    assert not (found.stored_ids[:, :, None] == found.ids[:, None]).any()


@pytest.mark.parametrize("gap", [30.0, 200.0])
def test_a_teacher_that_is_certain_has_a_tail_of_next_to_nothing(gap):
    t = logits()
    t[:, 3] += gap
    layout = TargetLayout(C, 1, 4)
    targets = CachedTargets(layout.unpack(layout.pack(compact_targets(t, 1.0, 1, 4, generator()))), C)
    assert targets.log_probs.isfinite().all() and targets.target.isfinite().all()
    torch.testing.assert_close(targets.target[:, 0], torch.ones(5), rtol=0, atol=1e-6)
    assert (targets.target * targets.log_probs).sum(1).abs().max() < 1e-4


def test_blocks_of_items_are_as_one(monkeypatch):
    whole = compact_targets(logits(), 1.0, 4, 6, generator())
    monkeypatch.setattr("hf_dis.teacher.targets.BLOCK_ELEMENTS", 2 * C)
    for name, value in compact_targets(logits(), 1.0, 4, 6, generator())._asdict().items():
        torch.testing.assert_close(value, getattr(whole, name), rtol=0, atol=1e-6, msg=name)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 33), st.integers(0, 12), st.integers(0, 2**31))
def test_integers_come_back(bits, count, seed):
    values = torch.randint(0, 2**bits, (3, count), generator=generator(seed))
    packed = pack_integers(values, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert torch.equal(unpack_integers(packed, count, bits), values)


@pytest.mark.parametrize(
    "layout", [TargetLayout(C, 7, 9), TargetLayout(C, 0, 9), TargetLayout(C, C, 0), TargetLayout(1, 1, 0)]
)
def test_targets_come_back_from_bytes(layout):
    found = compact_targets(logits(classes=layout.num_classes), 2.0, layout.depth, layout.sample_size, generator())
    packed = layout.pack(found)
    assert packed.dtype == torch.uint8 and packed.shape == (5, layout.item_bytes)
    back = layout.unpack(packed)
    assert torch.equal(back.ids, found.ids) and torch.equal(back.stored_ids, found.stored_ids)
    assert torch.equal(back.log_normaliser, found.log_normaliser.float())
    for name in ("log_probs", "log_tail_mass", "entropy"):
        torch.testing.assert_close(getattr(back, name), getattr(found, name).half().float(), rtol=0, atol=0)


def test_the_bytes_of_an_item():
    assert TargetLayout(3375, 48, 70).item_bytes == 281
    assert TargetLayout(10**6, 32, 48).item_bytes == 272
    assert TargetLayout(151_936, 8, 6).item_bytes == 56


@pytest.mark.parametrize("num_bytes", [60, 300])
@pytest.mark.parametrize("num_classes", [3375, 151_936, 10**6])
def test_an_item_is_filled_with_stored_classes(num_bytes, num_classes):
    layout = TargetLayout.within(num_bytes, num_classes, 2)
    assert layout.depth == 2 and layout.item_bytes <= num_bytes
    assert TargetLayout(num_classes, 2, layout.sample_size + 1).item_bytes > num_bytes


def test_an_item_stores_no_more_classes_than_the_tail_has():
    assert TargetLayout.within(300, 103, 32).sample_size == 71
    assert TargetLayout.within(60, 10**6, 32).sample_size < 0
