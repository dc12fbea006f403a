"""Parameters that FSDP2 does not gather for a step, in one process."""

import pytest
import torch
from fake_processes import one_of_four
from tiny_models import llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hf_dis.head.switch import SampledHead
from hf_dis.models.fsdp_units import KeptSharded
from hf_dis.models.spread import is_sharded_by_fsdp

C = 43


@pytest.fixture(scope="module")
def third_of_four():
    """One group for all tests: torch keeps the meshes of a group that has ended."""
    with one_of_four(rank=2):
        yield


def test_a_unit_gets_its_parameters_back(third_of_four):
    model = llama(C)
    fully_shard([model.model.norm, model.lm_head])
    fully_shard(model)
    model(input_ids=torch.ones(1, 2, dtype=torch.long))  # sets FSDP2 up
    (group,) = model.lm_head._get_fsdp_state()._fsdp_param_groups
    before = list(group.fsdp_params)
    head = SampledHead(model, ("lm_head",))
    head.set(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert len(before) == 2 and group.fsdp_params == before[:1]
    head.clear()
    assert group.fsdp_params == before
    # A group of the head alone is left out.
    alone = llama(C)
    fully_shard(alone.lm_head)
    fully_shard(alone)
    alone(input_ids=torch.ones(1, 2, dtype=torch.long))
    state = alone.lm_head._get_fsdp_state()
    kept = KeptSharded(alone, [alone.lm_head.weight])
    assert kept.found == 1 and state._fsdp_param_groups == []
    kept.release()
    assert len(state._fsdp_param_groups[0].fsdp_params) == 1


def test_a_unit_of_two_layers_gets_its_parameters_back(third_of_four):
    model, names = llama(C), ("model.layers.0.mlp.gate_proj", "lm_head")
    fully_shard([model.get_submodule(name) for name in names])
    fully_shard(model)
    model(input_ids=torch.ones(1, 2, dtype=torch.long))
    (group,) = model.lm_head._get_fsdp_state()._fsdp_param_groups
    before, ids = list(group.fsdp_params), torch.zeros(1, 1, dtype=torch.long)
    head = SampledHead(model, names)
    head.set(ids, ids, ids[0])
    assert len(before) == 2 and group.fsdp_params == []
    head.clear()
    assert group.fsdp_params == before


def test_a_model_that_is_not_set_up_is_left_as_it_is(third_of_four):
    model = fully_shard(llama(C))
    assert KeptSharded(model, [model.lm_head.weight]).found == 0


def test_tensor_parallel_rows_are_not_those_of_fsdp(third_of_four):
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    weight = distribute_tensor(torch.zeros(8, 2), mesh, [Shard(0)], src_data_rank=None)
    assert not is_sharded_by_fsdp(weight) and not is_sharded_by_fsdp(nn.Parameter(torch.zeros(8, 2)))
