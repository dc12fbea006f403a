"""The part of a teacher's targets that a sample is made from."""

import pytest
import torch

from hf_dis.sampling.answers import Chosen, Logits, _counted, side_by_side
from hf_dis.teacher.ranking import Candidates
from hf_dis.teacher.targets import TeacherTargets


def part(number, step):
    """A chunk of items of which one in ``step`` is counted."""
    normaliser, places = torch.zeros(number, 1), torch.zeros(number, 1, dtype=torch.long)
    counted = slice(0, number, step)
    per_counted = max(1, number) / max(1, len(range(number)[counted]))
    return Logits(Candidates(normaliser, places, 1), (), normaliser.T, counted, per_counted, None)


@pytest.mark.parametrize(
    ("sizes", "number"), [([16, 16, 8], 1), ([5], 1), ([0, 8, 8], 1), ([8, 0, 8], 1), ([8, 12, 12], 3), ([0], 1)]
)
def test_slices_of_chunks_hold_the_counted_items(sizes, number):
    """Chunks of a multiple of the step are one slice: no copy joins their items."""
    parts = [part(size, 8) for size in sizes]
    first, expected = 0, []
    for size, one in zip(sizes, parts, strict=True):
        expected += [(first + i, one.items_per_counted) for i in range(0, size, 8)]
        first += size
    found = _counted(parts)
    assert sorted((i, each) for each, slices in found.items() for one in slices for i in range(first)[one]) == expected
    assert len([one for slices in found.values() for one in slices if range(first)[one]]) in (number, 0)


@pytest.mark.parametrize("num_items", [8, 7, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_one_gather_of_a_chunk_finds_the_logits_of_labels_and_tails(num_items, size):
    logits = torch.randn(num_items, 30)
    tail_ids, labels = torch.randperm(30)[:8].view(2, 4).sort(1).values, torch.arange(num_items)
    joined = Chosen(tail_ids, labels, side_by_side(tail_ids, labels))
    for first in range(0, num_items, size):
        targets = TeacherTargets(logits[first : first + size], 1.0, 3)
        (found,) = joined.logits(targets, first)
        assert torch.equal(found, torch.cat(joined._replace(ids=None).logits(targets, first), 1))
