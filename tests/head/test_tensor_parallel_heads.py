"""Students that a tp_plan spreads over processes, in one process: what they are, and what is refused."""

import pytest
import torch
from fake_processes import one_of_four
from tiny_models import llama, vit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from hf_dis import DISArguments, RowSparseAdamW, VocabShard, shard_head
from hf_dis.head.spread_rows import local, sparse_leaf, spread_as
from hf_dis.head.tensor_parallel import check_same_sample, check_tensor_parallel, is_tensor_parallel, own_rows
from hf_dis.models.head_search import find_head_layers

C = 41


@pytest.fixture
def four_processes():
    """This process takes itself for the last of four; nothing is sent."""
    with one_of_four(rank=3):
        yield


def spread(processes=4, placement=None, num_classes=C):
    """A model whose head is spread, over the last of the processes."""
    model = llama(num_classes)
    mesh = init_device_mesh("cpu", (4 // processes, processes), mesh_dim_names=("dp", "tp"))["tp"]
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [placement or Shard(0)], src_data_rank=None)
    model.lm_head.weight = nn.Parameter(weight)
    return model


def check(student, teacher=None, names=("lm_head",), mode="sampled", **settings):
    check_tensor_parallel(student, teacher, names, DISArguments(**settings), mode)


def test_the_last_shard_is_shorter(four_processes):
    model = spread()
    rows = own_rows(model.lm_head)
    assert (rows.shard.start, rows.shard.stop) == (33, 41) and rows.weight.shape == (8, 16) and rows.bias is None
    assert find_head_layers(model, C) == ("lm_head",) and is_tensor_parallel(model)
    assert own_rows(llama(C).lm_head) is None and not is_tensor_parallel(llama(C))
    check(model)


def test_fewer_classes_than_processes(four_processes):
    with pytest.raises(ValueError, match=r"holds the classes from 5 up to 5.*fewer processes"):
        own_rows(spread(num_classes=5).lm_head)


def test_a_head_that_is_not_spread_by_its_rows(four_processes):
    with pytest.raises(ValueError, match=r"weight of the output head 'lm_head' is a DTensor, and not spread by its"):
        find_head_layers(spread(placement=Replicate()), C)


def test_a_bias_that_is_whole(four_processes):
    model = spread()
    model.lm_head.bias = nn.Parameter(torch.zeros(C))
    with pytest.raises(ValueError, match=r"bias of the output head 'lm_head' is a Parameter, and not spread by its"):
        find_head_layers(model, C)


def test_other_processes_than_those_of_the_run(four_processes):
    with pytest.raises(ValueError, match=r"spread over 2 processes, and the run has 4: load .* number of processes"):
        check(spread(processes=2))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"probe_steps": 3}, "probe_steps is 3, and the student is tensor-parallel.*set probe_steps to 0"),
        ({"names": ("a", "b")}, "made of a and b, and the student is tensor-parallel.*leave the head out"),
    ],
)
def test_settings_that_need_whole_rows(four_processes, keywords, message):
    with pytest.raises(ValueError, match=message):
        check(spread(), **keywords)


def test_copies_of_a_student_have_no_row_sparse_heads(four_processes):
    check(spread(), row_sparse_head=True)
    mesh, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "tp")), llama(C)
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None)
    model.lm_head.weight = nn.Parameter(weight)
    check(model)
    with pytest.raises(
        ValueError, match=r"has 4 processes for a student that is spread over 2.*load .* tp_size alone"
    ):
        check(model, row_sparse_head=True)


def test_rows_of_one_process_are_stepped(four_processes):
    mesh = init_device_mesh("cpu", (4,))
    weight = nn.Parameter(distribute_tensor(torch.zeros(13, 2), mesh, [Shard(0)], src_data_rank=None))
    part = spread_as(weight, torch.ones(1))  # the last process has one row
    assert part.shape == (13,) and local(part).shape == (1,) and local(weight).shape == (1, 2)
    sparse_leaf(weight).backward(torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (1, 2)))
    RowSparseAdamW([weight], lr=0.1).step()
    assert_close(local(weight), torch.full((1, 2), -0.1))
    plain = torch.zeros(3)
    assert spread_as(plain, plain) is plain and local(plain) is plain


def test_teachers_that_are_spread_in_another_way(four_processes):
    with pytest.raises(ValueError, match=r"teacher is tensor-parallel and the student is not.*cache of its targets"):
        check(llama(C), spread())
    teacher = vit(C)
    shard_head(teacher, "classifier")
    with pytest.raises(ValueError, match=r"head of the teacher is a ShardedHead.*cache of its targets"):
        check(spread(), teacher)


ITEM_IDS, TAIL_IDS = torch.arange(12).view(4, 3), torch.arange(5)[None]
OTHERS = {
    "an item": (ITEM_IDS[:3], TAIL_IDS),
    "the order": (ITEM_IDS.flip(0), TAIL_IDS),
    "a tail": (ITEM_IDS, TAIL_IDS + 1),
}


@pytest.mark.parametrize("other", OTHERS)
def test_samples_that_differ(monkeypatch, other):
    found = []
    monkeypatch.setattr(VocabShard, "gather", lambda self, own: (found.append(own), torch.stack(found))[1])
    for _ in range(2):
        check_same_sample(ITEM_IDS, TAIL_IDS, None)
    with pytest.raises(ValueError, match=r"have \[4, 4, \d\] items, or different classes. Give all of them the same"):
        check_same_sample(*OTHERS[other], None)
