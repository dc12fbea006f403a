"""The part of a teacher's targets that a sample is made from."""

import pytest
import torch

from hf_dis.sampling.answers import Logits, _counted
from hf_dis.teacher.ranking import Candidates


def part(number, step):
    """A chunk of items of which one in ``step`` is counted."""
    normaliser, places = torch.zeros(number, 1), torch.zeros(number, 1, dtype=torch.long)
    counted = slice(0, number, step)
    per_counted = max(1, number) / max(1, len(range(number)[counted]))
    return Logits(Candidates(normaliser, places, 1), None, None, (normaliser,), counted, per_counted, None)


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
