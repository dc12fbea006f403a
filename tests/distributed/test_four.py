"""Trainings of models that a tp_plan or FSDP2 alone spreads over four processes (gloo): as in one process."""

import four_worker as worker
import pytest
from launch import alone_and_processes
from same_training import assert_near_by_norm, assert_same_training, largest
from tiny_models import assert_near

pytestmark = pytest.mark.slow
STEPS = worker.models.STEPS


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return alone_and_processes(4, worker, tmp_path_factory)


@pytest.mark.parametrize("layout", worker.LAYOUTS)
@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: ", ".join(map(str, case)))
def test_a_training_is_that_of_one_process(runs, layout, case):
    for rank in runs[1]:
        assert_same_training(rank[layout, case], runs[0][layout, case], STEPS, 1e-10)


@pytest.mark.parametrize("layout", worker.LAYOUTS)
@pytest.mark.parametrize("case", worker.FLOAT32, ids=lambda case: ", ".join(map(str, case)))
def test_a_training_in_float32_is_that_of_one_process(runs, layout, case):
    """Gradients of later steps are those of students that rounding has moved apart: by 1.2e-6 in the fourth step."""
    expected = runs[0][layout, case, "float32"]
    for rank in runs[1]:
        found = rank[layout, case, "float32"]
        assert_near_by_norm(found["gradients"][0], expected["gradients"][0], 1e-6)
        assert_near(found["student"], expected["student"], 1e-6 * largest(expected["student"]))


@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_only_touched_rows_are_stepped(runs, layout):
    steps = runs[0][layout, (False, "whole", "reverse_kl", "row-sparse")]["steps"]
    assert 1 <= steps.min() < steps.max() == STEPS
