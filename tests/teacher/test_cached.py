"""Stored targets as columns of a sample, and the teacher that answers with them."""

import pytest
import torch
from tiny_models import column_ids

from hf_dis import SamplerSpec
from hf_dis.errors import DataError
from hf_dis.items import FILLER, Items, stored_items
from hf_dis.report.diagnostics import coverage
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.teacher.cached import UNKNOWN, CachedTargets, CachedTeacher, unpack_targets
from hf_dis.teacher.compact import CompactTargets, TargetLayout, compact_targets

C, DEPTH, STORED = 12, 3, 4
LAYOUT = TargetLayout(C, DEPTH, STORED)


def compact(logits, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return compact_targets(logits.to(dtype), 1.0, DEPTH, STORED, generator)


def certain_teacher(*ranked):
    """Logits of items that are certain of a few classes: all remaining ones underflow beside them."""
    logits = torch.full((len(ranked), C), -1000.0)
    for item, classes in enumerate(ranked):
        logits[item, list(classes)] = torch.arange(len(classes), 0, -1.0)
    return logits


# The last class ranked, the first ones ranked, the last ones, and none at either end.
CERTAIN = certain_teacher((11, 4, 5), (0, 1, 2), (9, 10, 11), (2, 0, 11), (4, 5, 6))


# A tail without mass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_stored_class_is_no_ranked_one_where_the_tail_has_no_mass(dtype):
    found = compact(CERTAIN, dtype)
    assert found.log_tail_mass.isneginf().all()
    assert found.stored_ids.tolist() == [[0] * 4, [3] * 4, [0] * 4, [1] * 4, [0] * 4]
    assert not (found.stored_ids[:, :, None] == found.ids[:, None]).any()


def test_masked_classes_are_a_tail_without_mass_too():
    logits = CERTAIN.masked_fill(CERTAIN == -1000, -torch.inf)
    found = compact(logits)
    assert not (found.stored_ids[:, :, None] == found.ids[:, None]).any() and found.entropy.isfinite().all()


def test_items_with_and_without_a_tail_do_not_mix():
    logits = torch.cat([CERTAIN, torch.randn(5, C)])
    found, alone = compact(logits), compact(CERTAIN)
    assert torch.equal(found.stored_ids[:5], alone.stored_ids)
    assert not (found.stored_ids[:, :, None] == found.ids[:, None]).any()


def test_a_tail_without_mass_carries_no_weight():
    targets = CachedTargets(LAYOUT.unpack(LAYOUT.pack(compact(CERTAIN))), C)
    assert (targets.target[:, DEPTH:] == 0).all() and (targets.log_probs[:, DEPTH:] == UNKNOWN).all()
    expected = torch.tensor([[2.0, 1, 0]]).softmax(1).expand(5, DEPTH)
    torch.testing.assert_close(targets.target[:, :DEPTH], expected, rtol=2e-3, atol=0)
    assert not targets.class_mass().any()


@pytest.mark.parametrize("rounding", [-1e-3, 0.0, 1e-3])
def test_a_tail_without_mass_has_no_probability_however_the_entropy_was_rounded(rounding):
    found = compact(CERTAIN)
    targets = CachedTargets(found._replace(entropy=found.entropy + rounding), C)
    assert (targets.log_probs[:, DEPTH:] == UNKNOWN).all()


def repeating():
    """As a cache of an earlier version stored an item whose tail has no mass: the last class, ranked or not."""
    return compact(CERTAIN)._replace(stored_ids=torch.full((5, STORED), C - 1))


@pytest.mark.parametrize("found", [compact(CERTAIN), repeating()], ids=["written now", "the last class stored"])
@pytest.mark.parametrize("sizes", [(C, 0), (STORED, C)], ids=["per item", "shared tail"])
def test_each_class_counts_once_in_the_normaliser(found, sizes):
    """With and without a label in the ranking, in the stored sample, and elsewhere."""
    targets = CachedTargets(found, C)
    spec = SamplerSpec(num_sampled_classes=sizes[0], num_shared_classes=sizes[1], proposal="uniform")
    for labels in (None, torch.tensor([11, 3, 0, 7, 8])):
        sample = make_cached_sampler(LAYOUT, spec).sample([targets], labels)
        counts = torch.zeros(5, C).scatter_add_(1, column_ids(sample), sample.log_weights.exp())
        torch.testing.assert_close(counts, torch.ones(5, C))
        assert (coverage(sample) <= 1 + 1e-5).all()


def test_a_stored_class_that_is_ranked_is_not_used():
    logits = torch.randn(2, C)
    found = compact(logits)
    ranked_too = found._replace(stored_ids=found.ids[:, [0, 0, 1, 2]].sort(1).values)
    targets = CachedTargets(ranked_too, C)
    assert not targets.used[:, DEPTH:].any() and (targets.target[:, DEPTH:] == 0).all()
    torch.testing.assert_close(targets.target.sum(1), torch.ones(2))
    assert CachedTargets(found, C).used[:, :DEPTH].all()


def test_there_is_no_sample_of_a_tail_without_classes():
    with pytest.raises(ValueError, match="sample_size is 2: it has to be 0 where depth is the number of classes"):
        compact_targets(CERTAIN, 1.0, C, 2, torch.Generator())
    assert compact_targets(CERTAIN, 1.0, C, 0, torch.Generator()).stored_ids.shape == (5, 0)


# The teacher of a cache


def packed(num_items=5):
    return LAYOUT.pack(compact(torch.randn(num_items, C)))


@pytest.mark.parametrize("method", ["__call__", "all_classes"])
def test_a_cached_teacher_answers_with_the_targets_of_the_batch(method):
    teacher, targets = CachedTeacher(LAYOUT, "abc"), packed()
    (found,) = getattr(teacher, method)({}, Items(5, targets=targets))
    assert len(found) == 5 and found.all_classes() is found and teacher.fingerprint == "abc"
    expected = CachedTargets(LAYOUT.unpack(targets), C)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.target, expected.target)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, r"holds no stored targets: collate it with"),
        (packed(4), r"targets of 4 items for this batch, and 5 are"),
    ],
)
def test_a_batch_without_its_targets(targets, message):
    with pytest.raises(DataError, match=message):
        next(CachedTeacher(LAYOUT, "abc")({}, Items(5, targets=targets)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("ids", 15), ("stored_ids", 15), ("log_probs", 0.0), ("log_tail_mass", 1.0), ("entropy", torch.nan)],
)
def test_targets_that_no_teacher_answers(name, value):
    sound = compact(torch.randn(5, C))
    bad = getattr(sound, name).clone()
    bad[1] = value
    spoilt = LAYOUT.pack(sound._replace(**{name: bad}))
    with pytest.raises(DataError, match=r"1 of 5 stored items do not fit 12 classes: .*write it again"):
        unpack_targets(LAYOUT, spoilt, check_values=True)
    assert isinstance(unpack_targets(LAYOUT, spoilt, check_values=False), CompactTargets)


def test_the_filler_between_examples_is_left_out():
    items = packed(3)
    found = torch.full((2, 2, LAYOUT.item_bytes), FILLER, dtype=torch.uint8)
    found[0, 0], found[1] = items[0], items[1:]
    assert torch.equal(stored_items(found), items)
