"""Sums over processes of tensors that are sparse in their rows: gradients and statistics of sampled classes.

``DistributedDataParallel`` cannot reduce such gradients. Every tensor has to be on the device of its process, which
the backend of torch.distributed serves: NCCL has no sums of tensors on the processor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_dis.distributed.processes import num_processes
from hf_dis.head.row_gradients import coalesced, sparse_rows
from hf_dis.head.spread_rows import is_row_sparse, local, spread_as


@torch.no_grad()
def average_rows(parameters: Iterable[nn.Parameter], over_processes: bool = True) -> None:
    """Makes gradients the mean over processes of their rows, sparse, coalesced and the same on every process.

    Call it on every process, with the same parameters in the same order.

    Args:
        parameters: of shape ``[C, ...]``. A gradient may be sparse in its rows or dense, which counts as all rows. It
            may be None where a process has none, which counts as no rows. Parameters that are not trained are left
            out. Parameters that FSDP2 or a ``tp_plan`` spreads by rows have the gradients of all processes already:
            these only become sparse.
        over_processes: take the mean. If False, each process has rows of its own, which only become sparse.
    """
    processes = num_processes() if over_processes else 1
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        gradient = coalesced(_row_sparse(parameter))
        if processes > 1 and not isinstance(parameter, DTensor):
            gradient = _sum_rows(gradient, processes)
        parameter.grad = spread_as(parameter, gradient)


def sum_over_processes(tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Sums of tensors over processes, the same on every process.

    Call it on every process, with the same names in the same order. A tensor that is sparse in its rows may have
    other rows on each process; only these rows are sent, and the result is not coalesced. With one process the tensors
    are returned as they are. No process waits for its accelerator.

    Args:
        tensors: dense, of the same shape on every process, or sparse in their rows, with as many entries on every
            process.
        group: the processes; None: all of the run. In tensor parallelism pass the data-parallel group of this process:
            the other processes hold the same items.
    """
    if num_processes() == 1 or dist.get_world_size(group) == 1:
        return tensors
    return {
        name: _all_rows(tensor, group) if tensor.is_sparse else _sum(tensor, group) for name, tensor in tensors.items()
    }


def _row_sparse(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter as a tensor that is sparse in its rows, or in those of this process."""
    rows, gradient = local(parameter), parameter.grad
    if gradient is None:
        return sparse_rows(rows.new_empty(0, dtype=torch.long), torch.empty_like(rows[:0]), rows.shape)
    if isinstance(gradient, DTensor) and not is_row_sparse(gradient):  # each process is to have all of its rows
        gradient = gradient.redistribute(placements=parameter.placements)
    gradient = local(gradient)
    if gradient.is_sparse:
        return gradient
    return sparse_rows(torch.arange(len(rows), device=rows.device), gradient, rows.shape)


def _sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_rows(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The entries of all processes, side by side."""
    ids, values = (_gathered(part, group) for part in (tensor._indices()[0], tensor._values()))
    return sparse_rows(ids, values, tensor.shape, is_coalesced=None)


def _sum_rows(tensor: Tensor, divisor: int) -> Tensor:
    """The sum over processes of coalesced tensors that are sparse in their rows, divided by a number.

    A map of the rows that some process has goes first, one byte per row of the whole tensor. Then every process sends
    these rows. Narrow floating-point types are summed in float32 and rounded once: small terms are not lost, and
    float16 does not overflow where the mean does not.
    """
    ids, rows = tensor._indices()[0], tensor._values()
    is_there = torch.zeros(len(tensor), dtype=torch.uint8, device=ids.device).index_fill_(0, ids, 1)
    dist.all_reduce(is_there, op=dist.ReduceOp.MAX)
    all_ids = is_there.nonzero()[:, 0]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = wide.new_zeros(len(all_ids), *rows.shape[1:])
    total.index_copy_(0, torch.searchsorted(all_ids, ids), wide)
    if len(all_ids):
        dist.all_reduce(total)
    return sparse_rows(all_ids, total.div_(divisor).to(rows.dtype), tensor.shape)


def _gathered(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensors of all processes, of one shape, one after another along their first dimension."""
    gathered = tensor.new_empty(dist.get_world_size(group) * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered
