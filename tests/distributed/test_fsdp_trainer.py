"""Trainings of students that FSDP2 shards, in two processes (gloo): as in one process."""

import fsdp_trainer_worker as worker
import pytest
from launch import alone_and_processes
from same_training import assert_same_training
from tiny_models import assert_near

pytestmark = pytest.mark.slow  # test_fsdp_sampled compares steps of a loop without a Trainer
STEPS = worker.models.STEPS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return alone_and_processes(2, worker, tmp_path_factory)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: ", ".join(map(str, case)))


@pytest.mark.parametrize("by", worker.BY)
@named(worker.CASES)
def test_a_training_is_that_of_one_process(runs, by, case):
    is_tied, mode = case[0], case[3]
    units = 2 if is_tied and by == "transformers" else 1  # which has the weight in a unit for each of the two layers
    for rank in runs[1]:
        found = rank[by, case]
        assert_same_training(found, runs[0]["transformers", case], STEPS, 1e-10)
        # The weight in each micro-batch, and in the comparison before the first one.
        sampled = 0 if mode == "exact" else 1 + 2 * (STEPS - {"warm-up": 2, "row-sparse": 1}.get(mode, 0))
        assert found["kept"] == [units] * sampled


@pytest.mark.parametrize("by", worker.BY)
@named(worker.FLOAT32)
def test_a_training_in_float32_is_that_of_one_process(runs, by, case):
    for rank in runs[1]:
        expected = runs[0]["transformers", case, "float32"]
        assert_same_training(rank[by, case, "float32"], expected, STEPS, 1e-6)


@pytest.mark.parametrize("by", worker.BY)
@named(worker.BF16)
def test_mixed_precision_trains(runs, by, case):
    first, second = (rank[by, case, "bf16"] for rank in runs[1])
    assert_near(first["student"], second["student"], 0)
    for name in ("loss", "kd_loss"):
        found, expected = (one["logs"][-1][name] for one in (first, runs[0]["transformers", case, "bf16"]))
        assert found == pytest.approx(expected, rel=0.02)


def test_a_student_that_the_first_process_loads(runs):
    for rank in runs[1]:
        assert_same_training(rank["efficient"], runs[0]["transformers", worker.CASES[0]], STEPS, 1e-10)


def test_only_touched_rows_are_stepped(runs):
    steps = runs[0]["transformers", (False, "whole", "reverse_kl", "row-sparse")]["steps"]
    assert 1 <= steps.min() < steps.max() == STEPS


@pytest.mark.parametrize("given", worker.RESUMED, ids=lambda given: f"{given[0][-1]}, {given[1]}")
def test_a_training_is_resumed_to_the_bit(runs, given):
    for rank in runs[1]:
        first, second = rank[("resumed", *given)]
        assert_near(second, first, 0)


def test_the_best_model_is_loaded_at_the_end(runs):
    expected = runs[0]["best"]
    assert min(expected["evaluated"]) < expected["evaluated"][-1]
    for rank in runs[1]:
        assert rank["best"]["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-9)
        assert_near(rank["best"]["student"], expected["student"], 1e-10)
