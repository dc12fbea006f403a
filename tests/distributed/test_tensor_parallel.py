"""Students and teachers that a tp_plan spreads over two processes (gloo): as in one process."""

import pytest
import tensor_parallel_worker as worker
import torch
from launch import two_processes
from tiny_models import assert_near

pytestmark = pytest.mark.slow  # test_sharded_exact compares single steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    worker.run(folder)
    alone = torch.load(folder / "rank_0.pt", weights_only=False)
    return alone, two_processes(worker.__file__, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", worker.cases(), ids=lambda case: ", ".join(map(str, case)))
def test_a_training_is_that_of_one_process(runs, case):
    expected = runs[0][case]
    for rank in runs[1]:
        found = rank[case]
        assert_near(found["student"], expected["student"], 1e-10)
        for mine, theirs in zip(found["gradients"], expected["gradients"], strict=True):
            assert_near(mine, theirs, 1e-10)
        for mine, theirs in zip(found["logs"], expected["logs"], strict=True):
            for name in ("loss", "grad_norm", "kd_loss", "ce_loss"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name  # a Trainer sums them in float32
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-9)
        assert found["predictions"] == pytest.approx(expected["predictions"], abs=1e-10)
        assert found["items"] == expected["items"]
        assert_near(found["saved"], expected["student"], 1e-10)
    assert len(expected["gradients"]) == worker.STEPS


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
