"""The processes that hold a sharded head: what they have to be, and how they save its model."""

from __future__ import annotations

import os
from os import PathLike
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


def check_processes(mesh: DeviceMesh | None) -> None:
    """Checks that the processes of a run are joined, and that a mesh holds all of them in one dimension.

    Args:
        mesh: of the processes, or None for all of them.

    Raises:
        ValueError: if a process is missing; names the remedy.
    """
    is_joined = dist.is_available() and dist.is_initialized()
    started = int(os.environ.get("WORLD_SIZE", 1))
    if not is_joined and started > 1:
        raise ValueError(
            f"the launcher started {started} processes, which are not joined yet: make the DISConfig, or call "
            "hf_dis.distributed.processes.start_processes(), before the head is sharded"
        )
    if mesh is None:
        return
    world = dist.get_world_size()
    if mesh.ndim != 1 or mesh.size() != world:
        raise ValueError(
            f"the mesh has the shape {tuple(mesh.shape)} and the run has {world} processes: a sharded head needs one "
            f"dimension of all processes; pass init_device_mesh(device, ({world},)), or mesh=None for the same"
        )


def only_saved_whole(
    model: nn.Module,
    save_directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Saves a model whose head is sharded by ``save_pretrained``, where the weights to save are given.

    Args:
        model: whose rows of the head are spread over several processes.
        save_directory, is_main_process, **kwargs: as for ``save_pretrained``.
        state_dict: the weights to save.

    Raises:
        ValueError: if no weights are given: they would be the rows of this process alone.
    """
    if state_dict is None:
        raise ValueError(
            f"save_pretrained of {type(model).__name__} would save the rows of this process alone, as its head is "
            "sharded: call trainer.save_model(folder) or trainer.push_to_hub() on every process"
        )
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **kwargs)
