"""Sums over processes of tensors that are sparse in their rows: gradients and statistics of sampled classes.

``DistributedDataParallel`` cannot reduce such gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_dis.distributed.processes import num_processes
from hf_dis.head.row_gradients import coalesced


@torch.no_grad()
def average_rows(parameters: Iterable[nn.Parameter]) -> None:
    """Makes row-sparse gradients their mean over processes, coalesced and the same on each; run it on all processes.

    Args:
        parameters: with sparse gradients, dense ones, which are of all rows, or None where a process has none; those
            that are not trained are left out.
    """
    processes = num_processes()
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


def sum_over_processes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of tensors over processes, the same on each process; run it on all processes.

    Of a tensor that is sparse in its rows only these rows are sent.
    """
    if num_processes() == 1:
        return tensors
    return {
        name: _sum_rows(tensor.coalesce()) if tensor.is_sparse else _sum(tensor) for name, tensor in tensors.items()
    }


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _sum_rows(tensor: Tensor) -> Tensor:
    """The sum over processes of coalesced tensors that are sparse in their rows."""
    ids, rows = tensor._indices()[0], tensor._values()
    counts = _gathered(torch.tensor([len(ids)], device=ids.device))
    longest = int(counts.max())
    # The padding is no row: in a gradient, a row of zeros would still be moved by its momentum.
    is_row = torch.arange(longest, device=ids.device) < counts[:, None]
    padding = longest - len(ids)
    ids = _gathered(torch.cat([ids, ids.new_zeros(padding)]))[is_row.flatten()]
    rows = _gathered(torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])]))[is_row.flatten()]
    return _sparse(ids, rows, tensor).coalesce()


def _gathered(tensor: Tensor) -> Tensor:
    """Tensors of one shape of all processes, one after another."""
    gathered = tensor.new_empty(num_processes() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def _sparse(ids: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], rows, like.shape, check_invariants=False)
