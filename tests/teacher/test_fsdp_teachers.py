"""Teachers that FSDP2 shards, as one process of four: parameters that are gathered, and refusals with a remedy."""

import pytest
import torch
from fake_processes import one_of_four
from tiny_models import llama, vit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_dis.head.check import check_sharded_head
from hf_dis.head.sharded import shard_head
from hf_dis.models.provenance import class_name
from hf_dis.models.spread import is_gathered_by_fsdp
from hf_dis.teacher.loading import placed

C, CPU = 43, torch.device("cpu")


@pytest.fixture(scope="module")
def third_of_four():
    """One group for all tests: torch keeps the meshes of a group that has ended."""
    with one_of_four(rank=2):
        yield


def test_layers_that_a_forward_gathers(third_of_four):
    model = llama(C)
    assert not is_gathered_by_fsdp(model, model.lm_head)
    fully_shard(model)
    assert is_gathered_by_fsdp(model, model.lm_head)
    model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert not isinstance(model.lm_head.weight, DTensor)  # FSDP2 keeps it for a backward
    assert is_gathered_by_fsdp(model, model.lm_head)
    assert isinstance(model.lm_head.weight, DTensor)
    left_out = llama(C)
    fully_shard(left_out, ignored_params={left_out.lm_head.weight})
    assert not is_gathered_by_fsdp(left_out, left_out.lm_head)


def test_a_tensor_parallel_layer_stays_spread(third_of_four):
    model, mesh = llama(C), init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh["tp"], [Shard(0)], src_data_rank=None)
    model.lm_head.weight = nn.Parameter(weight)
    fully_shard(model.lm_head, mesh=mesh["fsdp"])
    assert not is_gathered_by_fsdp(model, model.lm_head)


def test_the_class_of_a_model(third_of_four):
    assert class_name(fully_shard(llama(C))) == class_name(llama(C)) == "LlamaForCausalLM"


def test_offloaded_parameters(third_of_four, monkeypatch):
    teacher = fully_shard(llama(C))
    assert placed(teacher, CPU) is teacher
    monkeypatch.setattr(DTensor, "device", property(lambda _: torch.device("cuda")), raising=False)
    with pytest.raises(
        ValueError, match=r"FSDP has sharded the teacher and offloads.*fsdp_cpu_offload.*load .* whole"
    ):
        placed(teacher, CPU)


def test_a_sharded_head_beside_fsdp(third_of_four):
    student, teacher = vit(C), vit(C)
    for model in (student, teacher):
        shard_head(model, "classifier")
    check_sharded_head(student, teacher, ("classifier",))
    fully_shard(teacher, ignored_params=set(teacher.classifier.parameters()))
    with pytest.raises(
        ValueError, match=r"classifier of the teacher is sharded, and FSDP has .* too: leave shard_head"
    ):
        check_sharded_head(student, teacher, ("classifier",))
