"""The teacher's ranked answers to some items."""

import pytest
import torch

from hf_dis.teacher import targets as teacher_targets
from hf_dis.teacher.targets import GROUP, TeacherTargets, top_ranked


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("depth", [1, 5, 12, 99])
def test_targets_are_the_ranked_softmax(depth, temperature):
    logits = 2 * torch.randn(7, 12)
    p = (logits.double() / temperature).softmax(1)
    targets = TeacherTargets(logits, temperature, depth)
    order = p.argsort(1, descending=True)[:, :depth]
    assert len(targets) == 7 and torch.equal(targets.ids, order)
    torch.testing.assert_close(targets.log_probs.double(), p.gather(1, order).log(), rtol=1e-5, atol=1e-5)
    ids = torch.randint(12, (7, 9))
    torch.testing.assert_close(targets.log_prob(ids).double(), p.gather(1, ids).log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets.class_mass().double(), p.sum(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_targets_are_computed_in_float32_or_wider(dtype, computed):
    logits = torch.randn(3, 9).to(dtype)
    targets = TeacherTargets(logits, 2.0, 4)
    assert targets.log_probs.dtype == targets.log_prob(targets.ids).dtype == computed
    assert torch.equal(targets.log_probs, TeacherTargets(logits.to(computed), 2.0, 4).log_probs)


@pytest.mark.parametrize("block", [1, 24, 2**20], ids=["item by item", "two items", "at once"])
def test_blocks_of_items_change_nothing(block, monkeypatch):
    logits = torch.randn(5, 12, dtype=torch.float64)
    monkeypatch.setattr(teacher_targets, "BLOCK_ELEMENTS", block)
    targets = TeacherTargets(logits, 2.0, 3)
    probs = (logits / 2).softmax(1)
    torch.testing.assert_close(targets.log_probs.exp(), probs.topk(3).values)
    torch.testing.assert_close(targets.class_mass(), probs.sum(0))


@pytest.mark.parametrize("num_classes", [1, 9, 2 * 6 * GROUP - 1, 2 * 6 * GROUP, 1000])
@pytest.mark.parametrize("depth", [1, 6])
def test_top_ranked_is_topk(num_classes, depth):
    depth = min(depth, num_classes)
    logits = torch.rand(30, num_classes + 3).argsort(1)[:, :num_classes].double()  # distinct, and not contiguous
    for found, expected in zip(top_ranked(logits, depth), logits.topk(depth, dim=1), strict=True):
        assert torch.equal(found, expected)


def test_top_ranked_finds_neighbours_and_the_last_classes():
    """All of the highest in one group, in neighbouring classes, or among the classes that no group holds."""
    num_classes = 20 * GROUP + 5
    for highest in ([3 + 20 * place for place in range(GROUP)], range(70, 78), range(num_classes - 6, num_classes)):
        logits = torch.zeros(1, num_classes)
        logits[0, list(highest)] = torch.arange(1.0, len(highest) + 1)
        assert top_ranked(logits, len(highest))[1].tolist() == [list(highest)[::-1]]
