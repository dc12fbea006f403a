"""Row-sparse gradients of parameters whose rows are spread, in one process: as those of whole parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
from tiny_models import llama, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing import assert_close

from hf_dis import DISArguments, RowSparseAdamW, build_distiller
from hf_dis.distributed import average_rows
from hf_dis.head.row_gradients import clip_grad_norm_
from hf_dis.head.spread_rows import is_row_sparse, local, make_dense, sparse_leaf, spread_as

C, D = 7, 3


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A group of this process alone."""
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def both(process):
    """A weight and a bias that are whole, and the same ones spread by their rows."""
    mesh, generator = init_device_mesh("cpu", (1,)), torch.Generator().manual_seed(0)
    whole = [nn.Parameter(torch.randn(C, *size, generator=generator)) for size in ((D,), ())]
    return whole, [nn.Parameter(distribute_tensor(one.detach().clone(), mesh, [Shard(0)])) for one in whole]


def sparse(ids, *size):
    rows = torch.arange(1.0, 1 + len(ids) * (size[0] if size else 1)).view(len(ids), *size)
    return torch.sparse_coo_tensor(torch.tensor([ids]), rows, (C, *size))


def give_gradients(whole, spread, *ids):
    """Gradients by autograd, in several backward passes."""
    for some in ids:
        for mine, theirs in zip(spread, whole, strict=True):
            size = theirs.shape[1:]
            own = sparse(some, *size)
            theirs.grad = own if theirs.grad is None else theirs.grad + own
            sparse_leaf(mine).backward(own)


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine.full_tensor(), theirs, rtol=0, atol=1e-6)


def test_gradients_are_added_up(both):
    whole, spread = both
    give_gradients(whole, spread, [1, 4], [4, 2])
    for mine, theirs in zip(spread, whole, strict=True):
        assert isinstance(mine.grad, DTensor) and is_row_sparse(mine.grad) and not is_row_sparse(mine)
        assert_close(local(mine.grad).to_dense(), theirs.grad.to_dense())
    make_dense([*whole, *spread])
    assert whole[0].grad.is_sparse and not is_row_sparse(spread[0].grad)
    spread[0].grad += torch.ones_like(spread[0])  # as FSDP2 adds dense gradients
    give_gradients(whole, spread, [3])
    assert_close(spread[0].grad.to_local(), whole[0].grad.to_dense() + 1)
    frozen = spread[1].requires_grad_(False)
    assert not sparse_leaf(frozen).requires_grad


def test_steps_are_those_of_whole_parameters(both):
    whole, spread = both
    optimizers = [RowSparseAdamW(some, lr=0.1, weight_decay=0.5) for some in both]
    for ids in ([1, 4], [4, 2], None):
        if ids is None:  # a step on all classes, in which the bias has no gradient
            whole[0].grad = torch.ones(C, D)
            spread[0].grad = spread_as(spread[0], torch.ones(C, D))
        else:
            give_gradients(whole, spread, ids, [0])
        for some in both:
            average_rows(some)
        assert_close(*(clip_grad_norm_(some, 0.5) for some in both))
        for some, optimizer in zip(both, optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            assert all(one.grad is None for one in some)
        assert_same(spread, whole)
    for theirs, mine in zip(*both, strict=True):
        expected, found = (optimizer.state[one] for optimizer, one in zip(optimizers, (theirs, mine), strict=True))
        assert found.keys() == expected.keys()
        assert all(isinstance(one, DTensor) == isinstance(one, torch.Tensor) for one in found.values())
        for name, value in expected.items():
            one = found[name]
            assert_close(one.full_tensor() if isinstance(one, DTensor) else one, value, msg=name)


def test_a_loaded_state_continues(both):
    found = []
    for is_loaded in (False, True):
        whole, spread = copy.deepcopy(both)
        optimizer = RowSparseAdamW(spread, lr=0.1)
        for ids in ([1, 4], [4, 2]):
            give_gradients(whole, spread, ids)
            average_rows(spread)
            optimizer.step()
            optimizer.zero_grad()
            if is_loaded:
                state, optimizer = copy.deepcopy(optimizer.state_dict()), RowSparseAdamW(spread, lr=0.5)
                optimizer.load_state_dict(state)
        found.append([one.full_tensor() for one in spread])
    assert_close(*found, rtol=0, atol=0)


def test_the_norm_counts_gradients_that_all_processes_have_once(both):
    whole, spread = both
    give_gradients(whole, spread, [1, 4])
    plain = nn.Parameter(torch.zeros(2))
    plain.grad = torch.tensor([3.0, 4.0])
    spread[1].grad = spread_as(spread[1], torch.full((C,), 2.0))
    expected = torch.cat([plain.grad, local(spread[0].grad).to_dense().flatten(), spread[1].grad.to_local()]).norm()
    average_rows(spread[:1])
    assert_close(clip_grad_norm_([plain, *spread], float("inf")), expected)


def test_one_process_of_fsdp2_trains_as_a_whole_student(process):
    students = []
    for is_sharded in (False, True):
        student = llama(41, tie_word_embeddings=True).double().train()
        if is_sharded:
            fully_shard(student)
        settings = DISArguments(head_mode="sampled", num_sampled_classes=6, num_shared_classes=8, row_sparse_head=True)
        distiller = build_distiller(student, llama(41, seed=1, spread=30).double(), settings)
        optimizer = RowSparseAdamW(student.parameters(), lr=0.01)
        for number in range(3):
            # A window of a step on all classes and one on sampled classes, in both orders.
            for is_exact in (number == 0, number == 1):
                batch = tokens(3, 41, seed=number)
                with distiller.step(batch | {"labels": batch["input_ids"]}, warming_up=is_exact) as step:
                    step.loss(student(**step.inputs))[0].mean().backward()
            average_rows(distiller.head.parameters())
            clip_grad_norm_(student.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        students.append({name: one.to_local() if is_sharded else one for name, one in student.state_dict().items()})
    for name, expected in students[0].items():
        assert_close(students[1][name], expected, rtol=0, atol=1e-12, msg=name)
