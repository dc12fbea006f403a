"""DeepSpeed's ZeRO-2 and ZeRO-3 through Trainer over two real processes (gloo, CPU): the student of one process."""

import importlib.util
import shutil

import deepspeed_worker as worker
import pytest
import torch
from launch import by_torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-deepspeed"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its communication on CPU: needs g++"),
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Checkpoints on disk: under ZeRO-3 transformers loads a checkpoint in pieces."""
    folder = tmp_path_factory.mktemp("teachers")
    for task, _ in worker.CASES:
        worker.TASKS[task](worker.CLASSES, seed=1, spread=30).save_pretrained(folder / task)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teachers):
    folder = tmp_path_factory.mktemp("one")
    worker.run(folder, teachers)
    return torch.load(folder / "rank_0.pt", weights_only=False)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, teachers):
    return by_torchrun(2, worker.__file__, tmp_path_factory.mktemp("two"), str(teachers))


def distance(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).detach().abs().max()) for name in expected)


@pytest.mark.parametrize("stage", worker.STAGES)
@pytest.mark.parametrize(("task", "layout"), worker.CASES[:4])
def test_a_sharded_student_ends_as_that_of_one_process(ranks, alone, task, layout, stage):
    expected = alone[task, layout, 0]["student"]
    moved = distance(expected, dict(worker.TASKS[task](worker.CLASSES).named_parameters()))
    assert moved > 1e-2
    for rank in ranks:
        found = rank[task, layout, stage]
        assert found["optimizer"] == "DeepSpeedOptimizerWrapper" and found["sharded"] == (stage == 3)
        assert distance(found["student"], expected) < 1e-4 * moved
        for name in ("eval_loss", "eval_kl"):
            assert found["metrics"][name] == pytest.approx(alone[task, layout, 0]["metrics"][name], rel=1e-4)


@pytest.mark.parametrize("stage", worker.STAGES)
def test_the_processes_share_the_proposal_and_not_the_samples(ranks, stage):
    one, other = (rank["image", "dis", stage] for rank in ranks)
    assert distance(one["student"], other["student"]) == 0
    mine, others = dict(one["sampler"]), dict(other["sampler"])
    assert not torch.equal(mine.pop("generator"), others.pop("generator"))
    assert len(mine) == 6 and distance(mine, others) == 0


@pytest.mark.parametrize("stage", worker.STAGES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(ranks, stage):
    for rank in ranks:
        uninterrupted, resumed = rank["resume", stage]
        assert len(resumed) > 20 and distance(resumed, uninterrupted) == 0


@pytest.mark.parametrize("stage", worker.STAGES)
def test_the_teacher_is_whole_on_each_process(ranks, alone, stage):
    for rank in ranks:
        assert rank["image", "exact", stage]["teacher"] == alone["image", "exact", 0]["teacher"] > 0


def test_processes_that_accelerate_does_not_count_are_refused(ranks):
    """Each process would train on all data, and DeepSpeed would average their gradients."""
    for rank in ranks:
        assert "2 processes" in rank["miscounted"] and "accelerate counts 1" in rank["miscounted"]
        assert "use_cpu" in rank["miscounted"]
