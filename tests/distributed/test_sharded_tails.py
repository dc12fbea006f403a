"""Tails and class memories of which each process has a part of the classes (gloo): those of a process that has all."""

import pytest
import sharded_tails_worker as worker
import torch
from launch import processes


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
    return processes(request.param, worker.__file__, tmp_path_factory.mktemp("tails"))


def test_tails_are_those_of_one_process(runs):
    """The same classes; the sums of parts are rounded differently."""
    for rank in runs:
        assert len(rank["tails"]) == len(worker.CLASSES) * len(worker.KINDS) * len(worker.SIZES) * 20
        for case, ((ids, inclusion), (all_ids, all_inclusion), same_state) in rank["tails"].items():
            assert torch.equal(ids, all_ids), case
            torch.testing.assert_close(inclusion, all_inclusion, rtol=1e-13, atol=0)
            assert same_state, case
    different = [rank["tails"][30_011, "flat", "many", 0][0][0] for rank in runs]
    assert not torch.equal(different[0], different[1])


def test_a_memory_of_a_part_is_that_part_of_a_whole_one(runs):
    for rank in runs:
        for (_, steps), (found, expected) in rank["memories"].items():
            assert len(found) == (3 if steps == 1 else 6)
            for name, value in expected.items():
                if "density" in name and value.is_floating_point():
                    torch.testing.assert_close(found[name], value, rtol=1e-14, atol=0)
                else:
                    assert torch.equal(found[name], value), name


def test_the_mass_that_is_sent_for_many_classes_does_not_grow_with_them(runs):
    """Every process learns the same; the sampled mass has at most as many classes as points."""
    for rank in runs:
        (few, dense), (many, one), (more, other) = (rank["sent"][number] for number in worker.SENT)
        assert 0 < many == more and few < 4 * worker.SENT[0] + many
        assert (dense > 0).all()
        for marginal in (one, other):
            assert 0 < int((marginal > 0).sum()) <= 8 * len(runs)
        for found, expected in zip(rank["sent"].values(), runs[0]["sent"].values(), strict=True):
            assert torch.equal(found[1], expected[1])
