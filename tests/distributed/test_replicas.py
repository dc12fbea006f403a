"""Copies of tensor-parallel students, in four processes (gloo): as in one process."""

import pytest
import replicas_worker as worker
import torch
from fake_processes import one_of_four
from launch import alone_and_processes
from same_training import assert_same_training
from tiny_models import assert_near, llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hf_dis import DISArguments
from hf_dis.distributed.replicas import Replicas
from hf_dis.head.tensor_parallel import check_tensor_parallel
from hf_dis.models.spread import is_fully_sharded, is_spread_by_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return alone_and_processes(4, worker, tmp_path_factory)


def named(cases):
    return pytest.mark.parametrize(
        "case", [(name, *one) for name in cases for one in cases[name]], ids=lambda case: ", ".join(map(str, case))
    )


@pytest.mark.slow
@named(worker.CASES)
def test_a_training_is_that_of_one_process(runs, case):
    for rank in runs[1]:
        assert_same_training(rank[case], runs[0][case], worker.models.STEPS, 1e-10)


@pytest.mark.slow
@named(worker.FLOAT32)
def test_a_training_in_float32_is_that_of_one_process(runs, case):
    for rank in runs[1]:
        assert_same_training(rank[(*case, "float32")], runs[0][(*case, "float32")], worker.models.STEPS, 1e-6)


@pytest.mark.slow
def test_statistics_of_a_class_are_summed_once_over_the_copies(runs):
    case = ("FSDP", False, "whole", "forward_kl", "warm-up")
    expected = runs[0][case]["proposal"]
    for rank in runs[1]:
        found = rank[case]["proposal"]
        for name in expected.keys() - {"generator"}:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
            assert torch.equal(found[name], runs[1][0][case]["proposal"][name])


@pytest.mark.slow
@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_a_loop_without_a_trainer(runs, layout):
    for rank in runs[1]:
        assert_near(rank[layout, "own loop"], runs[0][layout, "own loop"], 1e-10)


@pytest.mark.slow
def test_copies_may_divide_by_items_of_their_own(runs):
    """The copies then weigh as much, whatever the number of their items."""
    together, apart = (rank["apart"]["gradients"][0] for rank in (runs[0], runs[1][0]))
    weight = "model.norm.weight"
    # The second copy has no item in the first step.
    torch.testing.assert_close(2 * apart[weight], together[weight], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(runs):
    expected = runs[0]["best"]
    for rank in runs[1]:
        assert rank["best"]["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-9)
        assert_near(rank["best"]["student"], expected["student"], 1e-10)
        assert rank["best"]["metrics"]["test_loss"] == pytest.approx(min(expected["evaluated"]), rel=1e-9)


# In one process


@pytest.fixture(scope="module")
def third_of_four():
    """One group for all tests: torch keeps the meshes of a group that has ended."""
    with one_of_four(rank=2):
        yield


def spread(shape, names):
    """A model whose head is spread over the last dimension of a mesh, and by FSDP over the remaining ones."""
    model = llama(41)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh["tp"], [Shard(0)], src_data_rank=None)
    model.lm_head.weight = nn.Parameter(weight)
    if len(shape) > 1:
        others = names[:-1] if len(names) > 2 else names[0]
        fully_shard(model.lm_head, mesh=mesh[others])
    return model


def test_the_copy_of_a_process(third_of_four):
    model = spread((2, 1, 2), ("dp_replicate", "fsdp", "tp"))
    replicas = Replicas.of(model)
    assert (replicas.index, replicas.number, len(replicas.across)) == (1, 2, 2)
    assert is_fully_sharded(model) and is_spread_by_rows(model.lm_head.weight)
    alone = Replicas.of(spread((4,), ("tp",)))
    assert (alone.index, alone.number, alone.across) == (0, 1, ())
    assert Replicas.of(llama(41)) is None


def test_a_teacher_over_other_processes(third_of_four):
    student, teacher = spread((2, 2), ("fsdp", "tp")), spread((4,), ("tp",))
    with pytest.raises(ValueError, match=r"process 2 .* \[2, 3\], and the teacher with \[0, 1, 2, 3\].*same"):
        check_tensor_parallel(student, teacher, ("lm_head",), DISArguments(), "sampled")
    check_tensor_parallel(student, spread((2, 2), ("fsdp", "tp")), ("lm_head",), DISArguments(), "sampled")
