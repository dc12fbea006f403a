"""The same rows give the same gradient and the same student, however they are split over processes (two real ones,
gloo) and accumulation steps: for every task, sampled and exact, in float32 and bfloat16, dense and row-sparse."""

import equality_worker as worker
import pytest
import torch
from launch import two_processes

pytestmark = pytest.mark.slow

CASES = [name for name, _ in worker.cases()]
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


@pytest.mark.parametrize(
    ("name", "processes", "accumulation"), SPLITS, ids=[f"{' '.join(n)} {p}x{a}" for n, p, a in SPLITS]
)
def test_gradient_and_student_do_not_depend_on_the_split(ranks, alone, name, processes, accumulation):
    reference, untrained = alone[(*name, 1)], worker.TASKS[name[0]](worker.CLASSES).state_dict()
    for results in ranks if processes == 2 else [alone]:
        found = results[(*name, accumulation)]
        for step in (0, 2) if name[2] == "fp32" else (0,):  # the third window has fewer examples
            size = max(float(gradient.abs().max()) for gradient in reference["gradients"][step].values())
            assert size > 1e-3
            gap = distance(found["gradients"][step], reference["gradients"][step])
            assert gap < TOLERANCE[name[2]] * size, f"step {step}"
        moved = distance(reference["student"], untrained)
        assert moved > 1e-2
        assert distance(found["student"], reference["student"]) < TOLERANCE[name[2]] * moved


def test_both_processes_have_the_same_student_to_the_bit(ranks):
    one, other = ranks
    for name in CASES:
        for accumulation in worker.ACCUMULATION if name[1] != "dis" else (1,):
            assert distance(one[(*name, accumulation)]["student"], other[(*name, accumulation)]["student"]) == 0, name


def test_without_average_tokens_each_process_counts_its_own_rows(ranks, tmp_path):
    """Then the gradient is the mean of the processes' own, which weighs their tokens differently."""
    rows, half = worker.data("causal LM")[worker.WINDOW :], worker.WINDOW // 2
    settings = {"max_steps": 1, **worker.LAYOUTS["exact"]}
    halves = [
        worker.train(tmp_path, "causal LM", 1, part, **settings)["gradients"][0]
        for part in (rows[:half], rows[half:16])
    ]
    expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    for rank in ranks:
        assert distance(rank["apart"]["gradients"][0], expected) < 1e-4 * size
    together = worker.train(tmp_path, "causal LM", 1, rows, **settings)["gradients"][0]
    assert distance(together, expected) > 1e-2 * size, "the two ways are alike: the test tests nothing"


def test_the_proposal_is_one_at_every_step_and_the_draws_are_not(ranks):
    one, other = (rank["own draws"] for rank in ranks)
    assert len(one["proposals"]) == worker.STEPS and len(one["proposals"][0]) == 5
    for mine, others in zip(one["proposals"], other["proposals"], strict=True):
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert not torch.equal(one["proposals"][0]["rank_weights"], one["proposals"][-1]["rank_weights"])
    assert not torch.equal(one["generator"], other["generator"])
    tails = zip(one["ids"], other["ids"], strict=True)
    assert not any(torch.equal(mine[1], others[1]) for mine, others in tails)
