"""Students and teachers that a tp_plan spreads over two processes (gloo): as in one process."""

import pytest
import tensor_parallel_worker as worker
from launch import alone_and_processes
from same_training import assert_same_training
from tiny_models import assert_near

pytestmark = pytest.mark.slow  # test_sharded_exact compares single steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return alone_and_processes(2, worker, tmp_path_factory)


@pytest.mark.parametrize("case", worker.cases(), ids=lambda case: ", ".join(map(str, case)))
def test_a_training_is_that_of_one_process(runs, case):
    for rank in runs[1]:
        assert_same_training(rank[case], runs[0][case], worker.STEPS, 1e-10)


@pytest.mark.parametrize("case", worker.float32_cases(), ids=lambda case: ", ".join(map(str, case)))
def test_a_training_in_float32_is_that_of_one_process(runs, case):
    for rank in runs[1]:
        assert_same_training(rank["float32"][case], runs[0]["float32"][case], worker.STEPS, 1e-6)


def test_only_touched_rows_are_stepped(runs):
    steps = runs[0][False, "whole", "reverse_kl", "row-sparse"]["steps"]
    assert 1 <= steps.min() < steps.max() == worker.STEPS


def test_mixed_precision_trains(runs):
    first, second = (rank["bf16"] for rank in runs[1])
    assert_near(first["student"], second["student"], 0)
    for name in ("loss", "kd_loss"):
        found, expected = (log["logs"][0][name] for log in (first, runs[0]["bf16"]))
        assert found == pytest.approx(expected, rel=0.02)


def test_the_best_model_is_loaded_at_the_end(runs):
    expected = runs[0]["best"]
    lowest = min(expected["evaluated"])
    assert lowest < expected["evaluated"][-1]
    for rank in runs[1]:
        assert rank["best"]["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-9)
        assert rank["best"]["metrics"]["test_loss"] == pytest.approx(lowest, rel=1e-9)
        assert_near(rank["best"]["student"], expected["student"], 1e-10)
