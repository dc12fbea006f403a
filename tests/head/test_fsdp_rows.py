"""Bytes that decide between the two ways of a head that FSDP2 shards, and the layers that FSDP2 has to gather."""

import pytest
import torch
from fake_processes import one_of_four
from tiny_models import gpt2, llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_dis.head.fsdp_rows import FsdpRows, StepNumbers
from hf_dis.models.head_search import find_head_layers
from hf_dis.models.spread import is_sharded_by_fsdp

C = 43  # 11 rows for each of three processes, and 10


@pytest.fixture(scope="module")
def third_of_four():
    """One group for all tests: torch keeps the meshes of a group that has ended."""
    with one_of_four(rank=2):
        yield


def test_bytes_of_both_ways():
    # 2 processes: 5 and 4 items of 3 own classes, 2 tails of 7 classes, features of 15 values and a bias, bfloat16.
    numbers = StepNumbers([[9, 8], [6, 10]], [5, 4], own=3, tails=2, shared=7, width=16, itemsize=2)
    # 8 rows and 6 rows come from the other process, with a class id of 4 bytes; gradients go back.
    assert numbers.bytes_of_rows() == (8 + 6) * (4 + 2 * 16 * 2)
    # 6 items, of which each tail has 3, go to the other process.
    ids, features, logits = 6 * 3 + 2 * 7, 6 * 16, 6 * (3 + 7)
    assert numbers.bytes_of_features() == 2 * (4 * ids + 2 * 2 * (features + logits))


def test_many_processes_send_rows_and_few_send_features():
    def ways(processes, items):
        rows = [[items * 8 // processes] * processes] * processes
        numbers = StepNumbers(rows, [items] * processes, own=8, tails=1, shared=0, width=1024, itemsize=2)
        return numbers.bytes_of_rows() < numbers.bytes_of_features()

    assert not ways(4, 2048) and ways(64, 2048)


def sharded(build=llama, **keywords):
    model = build(C)
    fully_shard(model, **keywords)
    return model, model.get_submodule(find_head_layers(model, C)[0])


def test_rows_of_a_process(third_of_four):
    model, head = sharded()
    rows = FsdpRows.of(model, head)
    assert is_sharded_by_fsdp(rows.weight) and rows.weight.to_local().shape == (11, head.in_features)
    assert rows.bias is None
    rows.release()


def test_an_embedding_of_the_same_weight(third_of_four):
    model, head = sharded(gpt2)
    model(input_ids=torch.ones(1, 2, dtype=torch.long))
    rows = FsdpRows.of(model, head)
    assert rows.embeddings == [model.transformer.wte]
    rows.release()


def test_layers_that_fsdp2_has_to_gather(third_of_four):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    hybrid = llama(C)
    layers = find_head_layers(hybrid, C)
    fully_shard(hybrid, mesh=mesh)
    assert FsdpRows.of(hybrid, hybrid.get_submodule(layers[0])) is None
    with pytest.raises(ValueError, match=r"row_sparse_head is set, .*not sharded over one group of processes: set"):
        FsdpRows.of(hybrid, hybrid.get_submodule(layers[0]), row_sparse=True)
    assert FsdpRows.of(*sharded(gpt2)) is None  # not set up: the embedding needs the weight
    with pytest.raises(ValueError, match="has not run on all classes yet, and shares the weight"):
        FsdpRows.of(*sharded(gpt2), row_sparse=True)
    scaled, head = sharded(gpt2)
    scaled.transformer.wte.scale_grad_by_freq = True
    scaled(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert FsdpRows.of(scaled, head) is None
    with pytest.raises(ValueError, match=r"its weight is tied to more than a plain nn\.Embedding"):
        FsdpRows.of(scaled, head, row_sparse=True)
    assert FsdpRows.of(llama(C), llama(C).lm_head) is None
    with pytest.raises(ValueError, match=r"'lm_head' is a DTensor.*HSDP call build_distiller before"):
        find_head_layers(hybrid, C)
