"""The teacher's ranked answers to some items."""

import pytest
import torch

from hf_dis import SamplerSpec, make_sampler
from hf_dis.teacher import targets as teacher_targets
from hf_dis.teacher.ranking import GROUP, top_ranked
from hf_dis.teacher.targets import TeacherTargets, chunk_items, mass_stride


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


def as_on_an_accelerator(logits, temperature, depth, items, stride):
    """Targets as an accelerator without kernels computes them: by blocks, ranked later, some items counted."""
    targets = TeacherTargets(logits, temperature, depth)
    targets.counted = slice(0, len(logits), stride)
    targets._mass = targets._found = None  # found when asked for
    return targets


@pytest.mark.parametrize(
    ("num_items", "stride"), [(1, 1), (255, 1), (256, 2), (900, 4), (1024, 8), (4095, 16), (4096, 32), (2**20, 32)]
)
def test_at_least_128_items_are_counted_where_there_are_as_many(num_items, stride):
    """A chunk starts with an item that is counted, so that the counted items of all chunks are one slice."""
    assert mass_stride(num_items) == stride
    assert chunk_items(num_items, 150_000, torch.device("cuda")) % stride == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", [20, 12 * GROUP, 12 * GROUP + 5])
def test_blocks_of_an_accelerator_give_the_same(num_classes, dtype, monkeypatch):
    monkeypatch.setattr(teacher_targets, "BLOCK_ELEMENTS", 2 * num_classes)
    logits = torch.rand(9, num_classes).argsort(1).div(4).to(dtype)  # distinct
    logits[:, 1] = -torch.inf
    logits[2, -1] = 40  # in no group, where there is a rest
    p, tolerance = (logits.double() / 0.7).softmax(1), 1e-12 if dtype == torch.float64 else 1e-5
    targets = as_on_an_accelerator(logits, 0.7, 5, items=4, stride=3)
    assert torch.equal(targets.ids, p.topk(5, dim=1).indices)
    torch.testing.assert_close(targets.log_probs.double().exp(), p.topk(5, dim=1).values, rtol=tolerance, atol=0)
    mass, added = 3 * p[::3].sum(0), torch.rand(num_classes, dtype=targets.log_normaliser.dtype)
    torch.testing.assert_close(targets.class_mass(added).double(), added + mass, rtol=tolerance, atol=tolerance)
    for _ in range(2):  # kept for another step
        torch.testing.assert_close(targets.class_mass().double(), mass, rtol=tolerance, atol=tolerance)


def test_chunks_that_are_ranked_together_give_the_same_sample():
    logits, labels = torch.randn(10, 200), torch.arange(10)
    spec = SamplerSpec(num_sampled_classes=4, num_shared_classes=12, num_tails=2, rank_depth=6)
    chunks = [as_on_an_accelerator(part, 2.0, 6, items=3, stride=1) for part in logits.split(4)]
    found, expected = (
        make_sampler(200, spec).sample(teacher, labels) for teacher in (chunks, [TeacherTargets(logits, 2.0, 6)])
    )
    assert torch.equal(found.item_ids, expected.item_ids) and torch.equal(found.tail_ids, expected.tail_ids)
    for name in ("log_weights", "log_probs", "target", "class_mass"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
