"""Parameters that transformers and FSDP spread over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

TENSOR_PARALLEL = "tp"


def is_spread_by_rows(value: torch.Tensor) -> bool:
    """Returns True for a parameter whose rows transformers spread over processes by a ``tp_plan``.

    FSDP may have copied the rows of a process to other processes, or have spread these rows once more.
    """
    if not isinstance(value, DTensor):
        return False
    placements = dict(zip(value.device_mesh.mesh_dim_names or (), value.placements, strict=False))
    return placements.get(TENSOR_PARALLEL) == Shard(0)


def is_sharded_by_fsdp(value: torch.Tensor) -> bool:
    """Returns True for a parameter whose rows FSDP2 spread over one group of processes, without tensor parallelism.

    The parameter of a unit that FSDP2 has gathered is an ordinary one.
    """
    if not isinstance(value, DTensor) or value.placements != (Shard(0),):
        return False
    return TENSOR_PARALLEL not in (value.device_mesh.mesh_dim_names or ())


def tensor_parallel_mesh(model: nn.Module) -> DeviceMesh | None:
    """Returns the processes over which a ``tp_plan`` spread a model, with those of FSDP; None for any other model."""
    meshes = [one.device_mesh for one in model.parameters() if isinstance(one, DTensor)]
    # A parameter that FSDP has made whole again has the dimension of the plan alone.
    return max((one for one in meshes if TENSOR_PARALLEL in (one.mesh_dim_names or ())), key=_ndim, default=None)


def _ndim(mesh: DeviceMesh) -> int:
    return mesh.ndim


def rows_of_group(value: DTensor) -> torch.Tensor:
    """Returns the rows of a parameter that a ``tp_plan`` gives this process; those that FSDP spread are gathered.

    Every process has to call it. Gradients of the rows become gradients of the parameter.

    Args:
        value: as for :func:`is_spread_by_rows`.
    """
    names = value.device_mesh.mesh_dim_names
    if len(names) > 1:
        value = value.redistribute(placements=[Shard(0) if name == TENSOR_PARALLEL else Replicate() for name in names])
    return value.to_local()


def is_fully_sharded(model: nn.Module) -> bool:
    """Returns True if torch's ``fully_shard`` (FSDP2) sharded a module of a model."""
    # Steps ask too: a run of one process need not look at the modules.
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Frees the whole parameters that FSDP2 has kept from an earlier forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_gathered_by_fsdp(model: nn.Module, layer: nn.Module) -> bool:
    """Returns True if FSDP2 gathers parameters of a layer in a forward; frees those that it has kept.

    Args:
        model: that FSDP2 sharded.
        layer: of the model. Parameters of a tensor-parallel layer stay spread in a forward.
    """
    reshard(model)
    meshes = [one.device_mesh for one in layer.parameters() if isinstance(one, DTensor)]
    return any(TENSOR_PARALLEL not in (mesh.mesh_dim_names or ()) for mesh in meshes)


def is_true_anywhere(value: bool, model: nn.Module) -> bool:
    """Returns True if a value is true on some process; every process that holds a part of the model has to ask.

    Args:
        value: of this process.
        model: that FSDP2 sharded.
    """
    reshard(model)  # parameters that FSDP2 has kept are ordinary ones
    mesh = next(one.device_mesh for one in model.parameters() if isinstance(one, DTensor))
    found = torch.tensor(int(value), device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return bool(found)


def whole(value: torch.Tensor) -> torch.Tensor:
    """Returns all of a tensor, for the part of this process; every process has to call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_offloaded_by_fsdp(model: nn.Module) -> bool:
    """Returns True if FSDP2 keeps its parts of a model's parameters on another device than the one that computes."""
    spread = [one for one in model.parameters() if isinstance(one, DTensor)]
    return any(one.device.type not in ("meta", one.device_mesh.device_type) for one in spread)
