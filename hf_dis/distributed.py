"""Row-sparse gradients over processes, averaged here: DistributedDataParallel cannot reduce them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, pad_across_processes
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
        parameters: with sparse gradients, or None where a process has none; those that are not trained are left out.
    """
    processes = PartialState().num_processes
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = _sparse(
                parameter.new_empty(0, dtype=torch.long), torch.empty_like(parameter[:0]), parameter
            )
        gradient = coalesced(parameter.grad)
        if processes > 1:
            ids, rows = gradient._indices()[0], gradient._values() / processes
            ids = gather(pad_across_processes(ids, pad_index=-1))
            rows = gather(pad_across_processes(rows))
            # The padding is no row: a row with a gradient of zero would still be moved by its momentum.
            gradient = _sparse(ids[ids >= 0], rows[ids >= 0], parameter).coalesce()
        parameter.grad = gradient


def _sparse(ids: Tensor, rows: Tensor, parameter: nn.Parameter) -> Tensor:
    return torch.sparse_coo_tensor(ids[None], rows, parameter.shape, check_invariants=False)
