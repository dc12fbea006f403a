"""The processes of a run, by torch.distributed; one process where it is not initialised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def num_processes() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process among those of the run, from 0 on."""
    return dist.get_rank() if num_processes() > 1 else 0


def is_first_of_machine() -> bool:
    """Tells if this process is the first one on its machine."""
    return num_processes() == 1 or int(os.environ.get("LOCAL_RANK", process_index())) == 0


def start_processes() -> torch.device:
    """Joins the processes that a launcher (``accelerate launch``, ``torchrun``) started, unless they are joined.

    Returns:
        the device of this process: its accelerator, or the processor.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if accelerator is None else torch.device(accelerator.type, local)
    if accelerator is not None:
        torch.accelerator.set_device_index(local)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group()
    return device


def wait_for_everyone() -> None:
    """Waits until every process has come here."""
    if num_processes() > 1:
        dist.barrier()


def of_first_process(compute: Callable[[], Any]) -> Any:
    """What the first process computes, on every process."""
    values = [compute() if process_index() == 0 else None]
    if num_processes() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def kept_from_ddp(model: nn.Module, module_names: Iterable[str]) -> Iterator[None]:
    """A model that is wrapped in ``DistributedDataParallel`` within this context keeps modules out of its reduction.

    Their parameters are first made those of the first process, as the wrapper does with all other parameters.

    Args:
        model: what is wrapped.
        module_names: among ``model.named_modules()``; :func:`hf_dis.distributed.average_rows` is to reduce their
            gradients.
    """
    parameters = {
        f"{module_name}.{name}": parameter
        for module_name in module_names
        for name, parameter in model.get_submodule(module_name).named_parameters()
    }
    if num_processes() > 1:
        for parameter in parameters.values():
            dist.broadcast(parameter.data, 0)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", None)
    model._ddp_params_and_buffers_to_ignore = [*(ignored or []), *parameters]
    try:
        yield
    finally:
        if ignored is None:
            del model._ddp_params_and_buffers_to_ignore
        else:
            model._ddp_params_and_buffers_to_ignore = ignored
