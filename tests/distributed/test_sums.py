"""Sums over two real processes (gloo) of tensors that are sparse in their rows, and decisions of the first process."""

import pytest
import sums_worker as worker
import torch
from launch import two_processes
from torch import nn

from hf_dis.distributed.sums import average_rows, sum_over_processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_processes(worker.__file__, tmp_path_factory.mktemp("two"))


# Gradients


@pytest.mark.parametrize("dtype", [*worker.DTYPES, "bias"], ids=str)
@pytest.mark.parametrize("case", worker.TOUCHED)
def test_gradients_are_means_over_processes_and_padding_is_no_row(ranks, case, dtype):
    touched = [ids or [] for ids in worker.TOUCHED[case]]
    shape = {"dtype": torch.float32, "width": 0} if dtype == "bias" else {"dtype": dtype}
    both = [worker.gradient(ids, rank, **shape).to_dense() for rank, ids in enumerate(touched)]
    expected = (sum(values.double() for values in both) / 2).to(shape["dtype"])
    for rank in ranks:
        found = rank[case, dtype]
        assert found.is_sparse and found.is_coalesced() and found.dtype == shape["dtype"]
        assert found.indices()[0].tolist() == sorted({*touched[0], *touched[1]})
        torch.testing.assert_close(found.to_dense(), expected)


def test_the_mean_of_float16_gradients_does_not_overflow_where_their_sum_does(ranks):
    for rank in ranks:
        assert rank["large"].values().tolist() == [[4e4] * worker.WIDTH]


def test_the_processes_agree_to_the_bit(ranks):
    for case in worker.TOUCHED:
        for dtype in (*worker.DTYPES, "bias"):
            one, other = (rank[case, dtype] for rank in ranks)
            assert torch.equal(one.indices(), other.indices()) and torch.equal(one.values(), other.values())


@pytest.mark.parametrize("ids", [[4, 1, 4], [], None, list(range(worker.CLASSES))], ids=str)
def test_one_process_has_its_own_gradient_in_rows(ids):
    parameter, frozen = nn.Parameter(torch.zeros(worker.CLASSES, worker.WIDTH)), nn.Parameter(torch.zeros(2))
    frozen.requires_grad_(False)
    if ids is not None:
        parameter.grad = worker.gradient(ids, 0)
        parameter.grad = parameter.grad.to_dense() if len(ids) == worker.CLASSES else parameter.grad
    expected = worker.gradient(ids or [], 0).to_dense()
    average_rows([parameter, frozen])
    assert parameter.grad.is_coalesced() and parameter.grad.indices()[0].tolist() == sorted(set(ids or []))
    assert torch.equal(parameter.grad.to_dense(), expected) and frozen.grad is None


# Statistics


def test_statistics_are_sums_over_processes_dense_and_sparse(ranks):
    both = [worker.gradient(ids, rank).to_dense() for rank, ids in enumerate(worker.TOUCHED["twice"])]
    for rank in ranks:
        sums = rank["sums"]
        assert list(sums) == ["rows", "dense", "not contiguous", "number"]
        assert sums["dense"].tolist() == [3, 3, 3] and int(sums["number"]) == 3
        assert torch.equal(sums["not contiguous"], 3 * torch.arange(6.0).view(2, 3).T)
        assert sums["rows"]._indices()[0].unique().tolist() == [0, 1, 4]
        torch.testing.assert_close(sums["rows"].to_dense(), sum(both))


def test_statistics_of_a_process_stay_its_own(ranks):
    for number, rank in enumerate(ranks):
        assert rank["statistics"]["dense"].tolist() == [number + 1.0] * 3
        assert int(rank["statistics"]["number"]) == number + 1


def test_one_process_has_the_sums_already():
    statistics = {"rows": worker.gradient([4, 1, 4], 0), "dense": torch.ones(3)}
    assert sum_over_processes(statistics) is statistics


# Processes


def test_each_process_knows_its_place(ranks):
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert [rank["first of machine"] for rank in ranks] == [True, False]
    assert [rank["first of its own machine"] for rank in ranks] == [True, True]
    assert [rank["first of all"] for rank in ranks] == [True, False]


def test_everyone_is_waited_for(ranks):
    assert [rank["waited"] for rank in ranks] == [True, True]


def test_the_first_process_decides_for_all(ranks):
    assert [rank["decided"] for rank in ranks] == [{"from": 0}, {"from": 0}]
    assert [rank["computed"] for rank in ranks] == [[0], []]


def test_a_module_kept_from_ddp_starts_equal_and_keeps_its_own_gradient(ranks):
    first, second = (rank["ddp"] for rank in ranks)
    for name, expected in first["own"].items():
        assert not torch.equal(second["own"][name], expected)
        assert torch.equal(first["shared"][name], expected) and torch.equal(second["shared"][name], expected)
        is_reduced = torch.equal(first["gradients"][name], second["gradients"][name])
        assert is_reduced == (name != "head.weight"), name  # that of a bias does not depend on the input
    assert first["left"] == second["left"] == ["head.bias"]
