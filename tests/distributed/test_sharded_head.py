"""Students whose heads are spread over processes (gloo): as with whole heads, whatever the number of processes."""

import pytest
import sharded_head_worker as worker
import torch
from launch import processes
from same_training import assert_near_by_norm
from tiny_models import assert_near

pytestmark = pytest.mark.slow  # test_sharded_exact and test_shards compare the parts in two processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The results of each process, by the number of processes."""
    folder = tmp_path_factory.mktemp("alone")
    worker.run(folder)
    alone = [torch.load(folder / "rank_0.pt", weights_only=False)]
    started = {
        number: processes(number, worker.__file__, tmp_path_factory.mktemp(f"of_{number}")) for number in (2, 4)
    }
    return {1: alone, **started}


def assert_same_training(found, expected, tolerance=1e-10):
    assert_near(found["student"], expected["student"], tolerance)
    assert_near(found["moments"], expected["moments"], tolerance)
    assert len(found["gradients"]) == len(expected["gradients"]) == worker.STEPS
    for mine, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert_near(mine, theirs, tolerance)
    assert {"eval_loss", "eval_ce_loss"} <= found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-9), name
    for mine, theirs in zip(found["logs"], expected["logs"], strict=True):
        for name in ("loss", "grad_norm", "kd_loss", "ce_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name  # a Trainer sums them in float32


@pytest.mark.parametrize("case", worker.cases(), ids=", ".join)
def test_a_sharded_head_trains_as_a_whole_one(runs, case):
    """The samples are those that a user gets: each process has its own."""
    for rank in runs[2]:
        found, expected = rank[(*case, True)], rank[(*case, False)]
        assert_same_training(found, expected)
        assert_near(found["proposal"], expected["proposal"], 1e-7)
        assert max(log["grad_norm"] for log in found["logs"]) > 0.05  # so that norms matter


@pytest.mark.parametrize("case", worker.teacher_cases(), ids=", ".join)
def test_a_sharded_teacher_teaches_as_a_whole_one(runs, case):
    for rank in runs[2]:
        found, expected = (rank[("sharded teacher", *case, is_sharded)] for is_sharded in (True, False))
        assert_same_training(found, expected)
        assert_near(found["proposal"], expected["proposal"], 1e-7)


@pytest.mark.parametrize("task", worker.TASKS)
def test_a_cache_of_a_sharded_teacher_is_that_of_a_whole_one(runs, task):
    for number in (1, 2, 4):
        for rank in runs[number]:
            found, expected = rank["cached by shards", task]
            assert len(found) == 6 and found == expected  # 48 examples in shards of 11, and the header


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("case", [case for case in worker.cases() if case[1] == "online"], ids=", ".join)
def test_the_number_of_processes_changes_nothing(runs, case, number):
    expected = runs[1][0][(*case, "one sample")]
    for rank in runs[number]:
        assert_same_training(rank[(*case, "one sample")], expected)


@pytest.mark.parametrize("task", worker.TASKS)
def test_a_sharded_head_of_one_process_trains_as_a_whole_one(runs, task):
    (alone,) = runs[1]
    assert_same_training(alone[task, "online", "reverse_kl", "row-sparse", "one sample"], alone["one sample", task])


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("gradients", worker.GRADIENTS)
@pytest.mark.parametrize("task", worker.TASKS)
def test_a_sharded_head_trains_as_a_whole_one_in_float32(runs, task, gradients, number):
    """To a millionth of the norm of the student, and of the gradient of each step."""
    expected = runs[1][0]["float32", task, gradients]
    for rank in runs[number]:
        found = rank["float32", task, gradients]
        assert_near_by_norm(found["student"], expected["student"], 1e-6)
        assert len(found["gradients"]) == len(expected["gradients"]) == worker.STEPS
        for mine, theirs in zip(found["gradients"], expected["gradients"], strict=True):
            assert_near_by_norm(mine, theirs, 1e-6)
        for mine, theirs in zip(found["logs"], expected["logs"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


@pytest.mark.parametrize("task", worker.TASKS)
def test_exact_distillation_is_the_same_for_one_two_and_four(runs, task):
    expected = runs[1][0]["exact", task, False]
    for number in (1, 2, 4):
        for rank in runs[number]:
            assert_same_training(rank["exact", task, True], expected)
            assert_same_training(rank["warm-up", task], expected)


@pytest.mark.parametrize("task", worker.TASKS)
def test_training_and_evaluation_on_all_classes_hold_no_whole_logits(runs, task):
    """They are computed twice, for one example, by the comparison before the first step."""
    for number in (1, 2, 4):
        assert [rank["whole logits", task] for rank in runs[number]] == [2] * number


@pytest.mark.parametrize("number", [2, 4])
def test_bytes_that_a_step_sends_do_not_grow_with_the_classes(runs, number):
    for rank in runs[number]:
        for few, many in rank["bytes"].values():
            assert 0 < many == few
