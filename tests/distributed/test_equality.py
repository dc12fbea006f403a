"""The same items give the same gradient and the same student, however they are split.

They are split over two real processes (gloo) and accumulation steps, for all tasks, sampled and exact, in float32 and
bfloat16, dense and row-sparse.
"""

import equality_worker as worker
import pytest
import torch
from launch import two_processes

pytestmark = pytest.mark.slow

CASES = [name for name, _ in worker.cases()]
APART = [name for name, _ in worker.apart_cases()]
SPLITS = [
    (name, processes, accumulation)
    for name in CASES
    for processes in (1, 2)
    for accumulation in worker.ACCUMULATION
    if (processes, accumulation) != (1, 1) and (name[1] != "dis" or accumulation == 1)
]
# Of the largest change of a weight over the steps, or of the largest gradient.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03, "row-sparse": 1e-3}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    worker.run(folder)
    return torch.load(folder / "rank_0.pt", weights_only=False)


def distance(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def assert_equal(found, expected, build, precision):
    """Compares the gradients of early steps, before rounding moves the students apart, and the students at the end."""
    for step in (0, 2) if precision == "fp32" else (0,):  # the third window has fewer examples
        size = max(float(gradient.abs().max()) for gradient in expected["gradients"][step].values())
        assert size > 1e-3
        gap = distance(found["gradients"][step], expected["gradients"][step])
        assert gap < TOLERANCE[precision] * size, f"step {step}"
    moved = distance(expected["student"], build(worker.CLASSES).state_dict())
    assert moved > 1e-2
    assert distance(found["student"], expected["student"]) < TOLERANCE[precision] * moved


@pytest.mark.parametrize(
    ("name", "processes", "accumulation"), SPLITS, ids=[f"{' '.join(n)} {p}x{a}" for n, p, a in SPLITS]
)
def test_gradient_and_student_do_not_depend_on_the_split(ranks, alone, name, processes, accumulation):
    for results in ranks if processes == 2 else [alone]:
        assert_equal(results[(*name, accumulation)], alone[(*name, 1)], worker.TASKS[name[0]], name[2])


def test_both_processes_have_the_same_student_to_the_bit(ranks):
    one, other = ranks
    for name in CASES:
        for accumulation in worker.ACCUMULATION if name[1] != "dis" else (1,):
            assert distance(one[(*name, accumulation)]["student"], other[(*name, accumulation)]["student"]) == 0, name


@pytest.mark.parametrize("accumulation", worker.ACCUMULATION)
@pytest.mark.parametrize("name", APART, ids=" ".join)
def test_without_average_tokens_each_process_counts_its_own_items(ranks, alone, name, accumulation):
    """The gradient is then the mean over processes, which weighs their tokens differently."""
    expected = alone[(*name, accumulation)]
    precision = name[2].removesuffix(", apart")
    for rank in ranks:
        assert_equal(rank[(*name, accumulation)], expected, worker.TASKS[name[0]], precision)
    together = alone[(*name[:2], precision, accumulation)]["gradients"]
    size = max(float(gradient.abs().max()) for gradient in together[0].values())
    gap = max(distance(together[step], expected["gradients"][step]) for step in (0, 2))
    # Both processes have as many images, except in the last window of an epoch with one batch per process.
    assert (gap > 1e-2 * size) == (name[0] != "image" or accumulation == 1)


def test_the_processes_share_the_proposal_at_every_step_and_not_the_samples(ranks):
    one, other = (rank["own samples"] for rank in ranks)
    assert len(one["proposals"]) == worker.STEPS and len(one["proposals"][0]) == 5
    for mine, others in zip(one["proposals"], other["proposals"], strict=True):
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert not torch.equal(one["proposals"][0]["rank_weights"], one["proposals"][-1]["rank_weights"])
    assert not torch.equal(one["generator"], other["generator"])
    tails = zip(one["ids"], other["ids"], strict=True)
    assert not any(torch.equal(mine[1], others[1]) for mine, others in tails)
