"""Loops without a Trainer over two real processes (gloo): the gradient of one process with all batches, in float64."""

import own_loop_worker as worker
import pytest
import torch
from launch import two_processes

RUNS = pytest.mark.parametrize(
    ("case", "loop", "accumulation"),
    worker.RUNS,
    ids=[f"{case} {loop} x{number}" for case, loop, number in worker.RUNS],
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    worker.run(folder)
    return torch.load(folder / "rank_0.pt", weights_only=False)


def tolerance(case, step):
    """A proposal learns from sums in float32, whose order differs where items are split."""
    return 1e-10 if step == 0 or case not in worker.LEARNS else 1e-6


def distance(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@RUNS
@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_do_not_depend_on_the_split(ranks, alone, case, loop, accumulation, processes):
    """Steps without an item on the second process included."""
    expected = alone[case, "torch", 1]  # all examples of a step in one batch
    assert len(expected) == worker.STEPS
    for results in ranks if processes == 2 else [alone]:
        found = results[case, loop, accumulation]
        assert [step["step"] for step in found] == list(range(worker.STEPS))
        for mine, reference in zip(found, expected, strict=True):
            size = max(float(gradient.abs().max()) for gradient in reference["gradients"].values())
            assert size > 1e-3 and mine["gradients"]["lm_head.weight"].dtype == torch.float64
            assert distance(mine["gradients"], reference["gradients"]) < tolerance(case, mine["step"])


@RUNS
def test_losses_of_the_processes_add_up(ranks, alone, case, loop, accumulation):
    losses = [[step["loss"] for step in rank[case, loop, accumulation]] for rank in ranks]
    assert losses[1][worker.WITHOUT_ITEMS] == 0 < losses[0][worker.WITHOUT_ITEMS]
    for mine, others, reference in zip(*losses, alone[case, "torch", 1], strict=True):
        assert mine + others == pytest.approx(reference["loss"], rel=tolerance(case, reference["step"]))


@pytest.mark.parametrize("case", worker.LEARNS)
def test_the_proposal_learns_from_the_items_of_all_processes(ranks, alone, case):
    for loop in worker.LOOPS:
        one, other = (rank[case, loop, 1] for rank in ranks)
        for mine, others, reference in zip(one, other, alone[case, "torch", 1], strict=True):
            assert distance(mine["proposal"], others["proposal"]) == 0
            assert distance(mine["proposal"], reference["proposal"]) < 1e-6
        assert distance(one[0]["proposal"], one[-1]["proposal"]) > 1e-3
