"""The loss on all classes of a sharded head, in two and four processes: as that of a whole head."""

import pytest
import sharded_exact_worker as worker
import torch
from launch import processes
from torch.testing import assert_close


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
    return processes(request.param, worker.__file__, tmp_path_factory.mktemp("exact"))


def assert_same(found, expected):
    evaluated = found.pop("evaluated")
    assert {name for name in expected if name.endswith("_loss")} <= evaluated.keys()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, rtol=0, atol=1e-10, msg=name)
        if name in evaluated:
            assert_close(evaluated[name], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("case", worker.cases(), ids=", ".join)
def test_loss_and_gradients_are_those_of_a_whole_head(runs, case):
    for rank in runs:
        found, expected = rank[case]
        assert_same(dict(found), expected)
    assert case[0] == "none" or max(float(rank[case][0]["weight"].abs().max()) for rank in runs) > 1e-3


def test_a_head_without_bias(runs):
    for rank in runs:
        found, expected = rank["no bias"]
        assert_same(dict(found), expected)


def test_the_best_ranked_classes_are_those_of_all_shards(runs):
    for rank in runs:
        for logits, ids in rank["ranked"]["found"]:
            expected = rank["ranked"]["logits"].topk(ids.shape[1])
            assert torch.equal(ids, expected.indices)
            assert_close(logits, expected.values)


def test_only_the_logits_of_a_teacher_grow_with_the_classes(runs):
    for rank in runs:
        few, many = rank["bytes"]["none"]
        assert 0 < few == many
        # The teacher's logits of five items go to their shards, once.
        few, many = rank["bytes"]["logits"]
        assert many - few == 5 * (4096 - 64) * 4


def test_a_teacher_with_an_item_too_few(runs):
    for rank in runs:
        assert "the teacher has targets of 4 items, and the student has features of 5" in rank["refused"]


def test_steps_of_tensor_parallel_models_are_those_of_whole_ones(runs):
    for rank in runs:
        for case in [name for name in rank if name[0] == "tensor parallel"]:
            found, expected = rank[case]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(found[name], value, rtol=0, atol=1e-10, msg=f"{case}: {name}")


def test_batches_of_a_tensor_parallel_student_that_differ(runs):
    if len(runs) == 2:
        for rank in runs:
            assert "items, or different classes. Give all of them the same batches" in rank["different batches"]
