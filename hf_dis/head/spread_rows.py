"""Row-sparse gradients of parameters whose rows are spread over processes, as FSDP2 and a ``tp_plan`` spread them.

Autograd makes no sparse gradient of a DTensor. So a step computes with a leaf that shares the memory of the rows of
this process. The leaf's gradient becomes that of the parameter: a DTensor whose local tensor is sparse, COO, in the
rows of this process. ``zero_grad`` works on the gradient as on any other. Clipping, averaging and the optimizer of
this package read the local tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds, in the same memory; of a DTensor without gradient."""
    if not isinstance(tensor, DTensor):  # as nearly all parameters in a step
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def is_row_sparse(gradient: Tensor) -> bool:
    """Returns True for a sparse gradient, and for one whose part of this process is sparse."""
    return local(gradient).is_sparse


def spread_as(parameter: Tensor, values: Tensor) -> Tensor:
    """Returns values of the rows of this process as a part of a tensor that is spread as a parameter is.

    Args:
        parameter: whole or spread by its rows, ``[C, ...]``.
        values: dense, ``[S, ...]``, or sparse in their rows; of the same trailing sizes as the parameter, or none.
    """
    if not isinstance(parameter, DTensor):
        return values
    if values.is_sparse:  # from_local takes a view, which a sparse tensor has none of
        return DTensor(values, parameter._spec, requires_grad=False)
    shape = torch.Size([len(parameter), *values.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    given = parameter.device_mesh, parameter.placements
    return DTensor.from_local(values, *given, run_check=False, shape=shape, stride=stride)


def sparse_leaf(parameter: DTensor) -> Tensor:
    """Returns the rows of this process as a leaf, ``[S, ...]``, whose gradients become the parameter's own.

    The gradient of the leaf has to be sparse in its rows, and complete. No gradient is summed over processes.

    Args:
        parameter: spread by its rows, ``[C, ...]``.
    """
    rows = local(parameter).detach().requires_grad_(parameter.requires_grad)
    if parameter.requires_grad:
        rows.register_post_accumulate_grad_hook(partial(_give, parameter))
    return rows


@torch.no_grad()
def make_dense(parameters: Iterable[nn.Parameter]) -> None:
    """Makes row-sparse gradients of spread parameters dense, so that autograd and FSDP2 can add dense ones to them."""
    for parameter in parameters:
        if isinstance(parameter.grad, DTensor) and is_row_sparse(parameter.grad):
            parameter.grad = spread_as(parameter, local(parameter.grad).to_dense())


@torch.no_grad()
def _give(parameter: DTensor, rows: Tensor) -> None:
    """Adds the gradient of a leaf to that of its parameter."""
    gradient, rows.grad = rows.grad, None
    if parameter.grad is not None:
        gradient = local(parameter.grad) + gradient
    parameter.grad = spread_as(parameter, gradient)
