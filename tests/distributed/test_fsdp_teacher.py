"""Teachers that FSDP2 shards, in two processes (gloo): they teach as whole ones, whatever the items of a process."""

import fsdp_teacher_worker as worker
import pytest
import torch
from launch import two_processes
from tiny_models import assert_near


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("case", worker.CASES, ids=", ".join)
def test_a_student_trains_as_with_a_whole_teacher(ranks, case):
    for rank in ranks:
        found, expected = rank[case]
        assert_near(found, expected, 1e-10)
        gradients = [one for name, one in expected.items() if name.startswith("gradient 4")]
        assert max(float(one.abs().max()) for one in gradients) > 1e-3
    numbers = [[int(rank[case][0][f"items {step}"]) for step in range(worker.STEPS)] for rank in ranks]
    if case[0] == "tensor parallel":
        assert numbers[0] == numbers[1]
    else:
        assert numbers[1][0] == 0 < numbers[1][1] != numbers[0][1]


@pytest.mark.parametrize("case", worker.ANSWERS, ids=", ".join)
def test_answers_are_those_of_a_whole_teacher(ranks, case):
    for number, rank in enumerate(ranks):
        found = rank[("answers", *case)]
        assert_near(*found["logits"], 1e-12)
        assert len(found["logits"][0][""]) == (0 if number else 28)
        assert len({*found["fingerprints"]}) == 1
    fingerprints = {rank[("answers", *case)]["fingerprints"][0] for rank in ranks}
    assert len(fingerprints) == 1


@pytest.mark.parametrize("case", worker.ANSWERS, ids=", ".join)
def test_an_answer_sends_as_much_as_a_forward(ranks, case):
    """The head is gathered once, for ten chunks."""
    for rank in ranks:
        for unit in ("bytes", "collectives"):
            answer, forward = rank[("answers", *case)][unit]
            assert answer == forward > 0


def test_mixed_precision(ranks):
    for rank in ranks:
        by_autocast, sharded, in_bfloat16, by_policy = rank["mixed"]
        assert_near(sharded, by_autocast, 0)
        assert_near(by_policy, in_bfloat16, 0)
        assert {one[""].dtype for one in rank["mixed"]} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("differs on a process", "not those of its output layer"),
        ("picks tokens", "it picks tokens after its output layer"),
        ("no model of transformers", "it is not of transformers"),
    ],
)
def test_models_that_cannot_be_split_are_refused_on_every_process(ranks, name, why):
    for rank in ranks:
        assert "FSDP has sharded the teacher" in rank["refusals"][name] and why in rank["refusals"][name]
        assert "Load the teacher whole, or train from a cache" in rank["refusals"][name]


def test_exact_steps_whose_items_count_differently_are_refused(ranks):
    for rank in ranks:
        assert "Begin the step with holds_logits=True" in rank["asked alone"]


@pytest.mark.parametrize("size", [9, 50])
def test_a_cache_is_that_of_a_whole_teacher(ranks, size):
    for rank in ranks:
        found, expected = rank["cached", size]
        assert found == expected and len(found) == 1 + (5 if size == 9 else 1)


def test_a_trainer(ranks):
    """No process hangs where the first one alone writes the manifest, and no file holds anything of the teacher."""
    for rank in ranks:
        found, expected = rank["trained"]
        assert_near(found["student"], expected["student"], 1e-10)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        assert found["manifest"] == expected["manifest"] and found["files"] == expected["files"]
