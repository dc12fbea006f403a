"""A run by one process that two real processes (gloo) resume, and the other way round."""

import pytest
import resume_worker as worker
import torch
from launch import two_processes

from hf_dis import make_sampler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of one process, with the checkpoint of two, and of two processes, with the checkpoint of one."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    worker.run(one, None)
    ranks = two_processes(worker.__file__, two, str(one))
    worker.run(one, two)
    return torch.load(one / "rank_0.pt", weights_only=False), ranks


def distance(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def test_exact_distillation_ends_as_if_the_processes_had_not_changed(runs):
    alone, ranks = runs
    whole = alone["exact", "whole"]["student"]
    moved = distance(whole, worker.vit(40).state_dict())
    assert moved > 1e-2
    for resumed in (alone, *ranks):
        assert resumed["exact", "resumed"]["step"] == worker.STEPS
        assert distance(resumed["exact", "resumed"]["student"], whole) < 1e-4 * moved


@pytest.mark.parametrize("name", worker.RUNS)
def test_the_rest_of_the_epoch_and_the_next_are_the_same_examples(runs, name):
    alone, ranks = runs
    for step in range(worker.STEPS):
        expected = sorted(alone[name, "whole"]["items"][step])
        assert len(expected) == worker.WINDOW
        split = sorted(item for rank in ranks for item in rank[name, "resumed"]["items"].get(step, []))
        joined = sorted(alone[name, "resumed"]["items"].get(step, []))
        for found in (split, joined):
            assert found == (pytest.approx(expected) if step >= worker.SAVED else [])


def test_the_proposal_goes_on_and_so_do_the_samples_of_processes_that_were_there(runs):
    alone, ranks = runs
    by_one, by_two = (result["sampled", "whole"]["saved"] for result in (alone, ranks[0]))
    assert not torch.equal(by_one["generator"], by_two["generator"])
    for result, saved in ((ranks[0], by_one), (alone, by_two)):
        begin = result["sampled", "resumed"]["begin"]
        assert begin.keys() == saved.keys() and len(begin) == 7
        assert [name for name in begin if not torch.equal(begin[name], saved[name])] == []


def test_a_process_that_is_new_shares_the_proposal_and_samples_from_its_own_seed(runs):
    _, ranks = runs
    first, second = (rank["sampled", "resumed"]["begin"] for rank in ranks)
    fresh = make_sampler(40, seed=42 + 1).generator.get_state()  # the default seed, and the process's number
    assert torch.equal(second["generator"], fresh) and not torch.equal(first["generator"], fresh)
    assert [name for name in first if name != "generator" and not torch.equal(first[name], second[name])] == []
    ends = [rank["sampled", "resumed"]["end"] for rank in ranks]
    assert [name for name in first if name != "generator" and not torch.equal(ends[0][name], ends[1][name])] == []


def test_it_is_told_once_with_both_numbers(runs):
    alone, ranks = runs
    for name in worker.RUNS:
        (split,) = ranks[0][name, "resumed"]["told"]
        (joined,) = alone[name, "resumed"]["told"]
        assert "saved by 1 processes and is resumed by 2" in split
        assert "saved by 2 processes and is resumed by 1" in joined
        assert ranks[1][name, "resumed"]["told"] == []
