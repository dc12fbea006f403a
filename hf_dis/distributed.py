"""Sums over processes of what is sparse in its rows: gradients, which DistributedDataParallel cannot reduce, and
statistics of drawn classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather, pad_across_processes, reduce
from torch import Tensor, nn

from .sparse import coalesced


@contextmanager
def kept_from_ddp(model: nn.Module, module_names: Iterable[str]) -> Iterator[None]:
    """A model that is wrapped in ``DistributedDataParallel`` within this context keeps modules out of its reduction.

    Its parameters are first made those of the first process, as that wrapper does with all others.

    Args:
        model: what is wrapped.
        module_names: among ``model.named_modules()``; :func:`average_rows` is to reduce their gradients.
    """
    parameters = {
        f"{module_name}.{name}": parameter
        for module_name in module_names
        for name, parameter in model.get_submodule(module_name).named_parameters()
    }
    if PartialState().num_processes > 1:
        for parameter in parameters.values():
            broadcast(parameter.data)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", None)
    model._ddp_params_and_buffers_to_ignore = [*(ignored or []), *parameters]
    try:
        yield
    finally:
        if ignored is None:
            del model._ddp_params_and_buffers_to_ignore
        else:
            model._ddp_params_and_buffers_to_ignore = ignored


@torch.no_grad()
def average_rows(parameters: Iterable[nn.Parameter]) -> None:
    """Makes row-sparse gradients their mean over processes, coalesced and the same on each; run it on all of them.

    Args:
        parameters: with sparse gradients, dense ones, which are of all rows, or None where a process has none; those
            that are not trained are left out.
    """
    processes = PartialState().num_processes
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = _sparse(
                parameter.new_empty(0, dtype=torch.long), torch.empty_like(parameter[:0]), parameter
            )
        elif not parameter.grad.is_sparse:
            parameter.grad = _sparse(torch.arange(len(parameter), device=parameter.device), parameter.grad, parameter)
        gradient = coalesced(parameter.grad)
        if processes > 1:
            gradient = _sum_rows(gradient)
            gradient._values().div_(processes)
        parameter.grad = gradient


def check_process_count() -> None:
    """Checks that accelerate counts as many processes as there are.

    Raises:
        ValueError: if it does not: of DeepSpeed's processes on a machine without an accelerator it takes each for the
            only one, and all of them would train on the same data.
    """
    found = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    counted = PartialState().num_processes
    if found != counted:
        raise ValueError(
            f"DeepSpeed runs {found} processes and accelerate counts {counted}, as it does without an accelerator: "
            "each would train on all data. Run it where there are accelerators, or leave deepspeed out and set "
            "use_cpu=True, for plain data parallelism"
        )


def of_first_process(compute: Callable[[], Any]) -> Any:
    """What the first process computes, on every process."""
    values = [compute() if PartialState().is_main_process else None]
    return broadcast_object_list(values)[0]


def sum_over_processes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of tensors over processes, the same on each; of sparse ones, which are sparse in their rows, only these are
    sent. Run it on all processes."""
    return {
        name: _sum_rows(tensor.coalesce()) if tensor.is_sparse else reduce(tensor, reduction="sum")
        for name, tensor in tensors.items()
    }


def _sum_rows(tensor: Tensor) -> Tensor:
    """The sum over processes of coalesced tensors that are sparse in their rows."""
    if PartialState().num_processes == 1:
        return tensor
    ids = gather(pad_across_processes(tensor._indices()[0], pad_index=-1))
    rows = gather(pad_across_processes(tensor._values()))
    # The padding is no row: in a gradient, a row of zeros would still be moved by its momentum.
    return _sparse(ids[ids >= 0], rows[ids >= 0], tensor).coalesce()


def _sparse(ids: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], rows, like.shape, check_invariants=False)
