"""The processes of a run, by torch.distributed; one process where it is not initialised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def num_processes() -> int:
    """The number of processes of the run, 1 or more."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process among those of the run, from 0 on."""
    return dist.get_rank() if num_processes() > 1 else 0


def is_first_of_machine() -> bool:
    """Returns True on one process of each machine: the one with ``LOCAL_RANK`` 0, or the first of the run."""
    return num_processes() == 1 or int(os.environ.get("LOCAL_RANK", process_index())) == 0


def start_processes() -> torch.device:
    """Joins the processes that a launcher (``accelerate launch``, ``torchrun``) started, unless they are joined.

    Returns:
        the device of this process: its accelerator where there is one, otherwise the processor. An accelerator is
        chosen by ``LOCAL_RANK``; without a launcher it is the current one. ``accelerate launch --cpu`` asks for the
        processor.
    """
    device = _device(os.environ.get("LOCAL_RANK"))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, rank, world_size = _launcher_store()
        # Each group has keys of its own: a second group would find the addresses of the first, which are closed.
        store = dist.PrefixStore(f"hf_dis/{next(_groups)}", store)
        dist.init_process_group(store=store, rank=rank, world_size=world_size)
    return device


@cache
def _launcher_store() -> tuple[dist.Store, int, int]:
    """The store by which the processes of a launcher meet, the number of this process, and their number."""
    return next(iter(dist.rendezvous("env://")))


_groups = count()


@contextmanager
def joined_processes() -> Iterator[torch.device]:
    """Joins the processes of a launcher for the time of this context; see :func:`start_processes`.

    A process group that exists already is used and left as it is. A group that this context starts ends with it,
    because threads of a group that are alive at the exit can abort the process.

    Yields:
        the device of this process.
    """
    was_joined = dist.is_available() and dist.is_initialized()
    device = start_processes()
    try:
        yield device
    finally:
        if num_processes() > 1 and not was_joined:
            dist.destroy_process_group()


def _device(local_rank: str | None) -> torch.device:
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on")
    if wants_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    if local_rank is not None:  # a launcher may show each process one accelerator only
        torch.accelerator.set_device_index(int(local_rank) % torch.accelerator.device_count())
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


def wait_for_everyone() -> None:
    """Waits until every process has called this function."""
    if num_processes() > 1:
        dist.barrier()


def of_first_process(compute: Callable[[], T]) -> T:
    """Computes a value on the first process and returns it on every process; call it on every process.

    Args:
        compute: is called on the first process only; its value is pickled for the other processes.
    """
    values = [compute() if process_index() == 0 else None]
    if num_processes() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def kept_from_ddp(model: nn.Module, module_names: Iterable[str]) -> Iterator[None]:
    """Keeps modules of a model out of the reduction of ``DistributedDataParallel``; wrap the model in this context.

    The parameters of these modules become those of the first process, as the wrapper does with all other parameters.

    Args:
        model: is wrapped within the context, on its device.
        module_names: among ``model.named_modules()``. :func:`hf_dis.distributed.average_rows` has to average the
            gradients of these modules after every backward pass.
    """
    parameters = [one for name in module_names for one in model.get_submodule(name).parameters()]
    if num_processes() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)
    kept = {id(parameter) for parameter in parameters}
    # A tied parameter has several names, and the wrapper looks for each of them.
    names = [name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in kept]
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", None)
    model._ddp_params_and_buffers_to_ignore = [*(ignored or []), *names]
    try:
        yield
    finally:
        if ignored is None:
            del model._ddp_params_and_buffers_to_ignore
        else:
            model._ddp_params_and_buffers_to_ignore = ignored
