"""Gradients of an output head at sampled classes: sums per touched row, coalescing and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hf_dis.head.spread_rows import is_row_sparse, local
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.items import true_places
from hf_dis.kernels import uses_triton
from hf_dis.sampling.designs import Updates


def coalesced(gradient: Tensor) -> Tensor:
    """Returns a sparse gradient with each row once, in ascending order.

    Clipping and unscaling drop the mark of a coalesced tensor. Comparing the ids costs a fraction of sorting again.

    Args:
        gradient: sparse COO, with one sparse dimension.
    """
    ids = gradient._indices()
    if not gradient.is_coalesced() and bool((ids[0, 1:] > ids[0, :-1]).all()):
        return sparse_rows(ids[0], gradient._values(), gradient.shape)
    return gradient.coalesce()


def sparse_rows(ids: Tensor, rows: Tensor, shape: Sequence[int], is_coalesced: bool | None = True) -> Tensor:
    """Makes a gradient of some rows, sparse COO in its first dimension; the ids are not checked.

    Args:
        ids: of the rows, ``[U]``.
        rows: their gradients, ``[U, ...]``.
        shape: of the parameter, ``[C, ...]``.
        is_coalesced: the ids are ascending and distinct; None: that is not known.
    """
    return torch.sparse_coo_tensor(ids[None], rows, shape, check_invariants=False, is_coalesced=is_coalesced)


def clip_grad_norm_(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    shard: VocabShard | None = None,
    sharded: Iterable[nn.Parameter] = (),
) -> Tensor:
    """Clips gradients as ``torch.nn.utils.clip_grad_norm_``, with row-sparse ones scaled in place, not copied.

    Args:
        parameters: their sparse gradients have to be coalesced. Where FSDP2 or a ``tp_plan`` spreads parameters over
            processes, all processes have to call this together.
        max_norm: of all gradients together, above 0.
        shard: of a sharded head, whose processes have to call this together; None: there is none.
        sharded: the parameters of that head, of which each process has some rows.

    Returns:
        the norm before clipping, a scalar.
    """
    parameters = list(parameters)
    dense = [local(values) for values in _values(parameters)]
    if shard is not None or any(isinstance(parameter.grad, DTensor) for parameter in parameters):
        norm = _norm_of_parts(parameters, shard, sharded)
    else:
        norm = torch.linalg.vector_norm(dense[0]) if len(dense) == 1 else torch.nn.utils.get_total_norm(dense)
    divisor = norm + 1e-6 if max_norm == 1 else (norm + 1e-6).div_(max_norm)
    divisor = divisor.clamp_min_(1)
    for device, here in _by_device(dense).items():
        torch._foreach_div_(here, divisor.to(device))  # a few launches for all parameters
    return norm


def _values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are; of a row-sparse one the rows, of this process if the rows are spread."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [local(gradient)._values() if is_row_sparse(gradient) else gradient for gradient in gradients]


def _norm_of_parts(
    parameters: list[nn.Parameter], shard: VocabShard | None, sharded: Iterable[nn.Parameter]
) -> Tensor:
    """The norm of all gradients, where those of some are spread over processes; those that all have count once."""
    held = {id(parameter) for parameter in sharded}
    parts: dict[tuple[DeviceMesh | None, VocabShard | None], list[nn.Parameter]] = {}
    if shard is not None:
        parts[None, shard] = []  # each process takes part in the sum, with or without a gradient
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            mesh, summed = None, shard if id(parameter) in held else None
            if isinstance(gradient, DTensor) and is_row_sparse(gradient):
                summed = VocabShard(0, 1, gradient.device_mesh.get_group())
            elif isinstance(gradient, DTensor):
                mesh = gradient.device_mesh
            parts.setdefault((mesh, summed), []).append(parameter)
    norms = []
    for (_, summed), part in parts.items():
        norm = torch.nn.utils.get_total_norm(_values(part))
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(parameters[0].device)
        norms.append(norm if summed is None else summed.sum(norm.square()).sqrt())
    wide = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    return torch.linalg.vector_norm(torch.stack([norm.to(wide) for norm in norms]))


def _by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    return by_device


def _sorted(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts ids ``[P]``; returns them with their former places. Equal ids keep their order."""
    if ids.device.type != "cpu":
        return ids.sort(stable=True)
    # numpy sorts integers by vector instructions, but has no such sort with places: packing both takes half the time.
    bits = len(ids).bit_length()
    both = torch.from_numpy(np.sort((ids << bits | torch.arange(len(ids))).numpy()))
    return both >> bits, both & 2**bits - 1


def _most_classes(place: Tensor) -> int:
    """The number of classes, for the place of each contribution's class; off the CPU the most that there can be.

    Entries beyond the number of classes stand for no class.
    """
    return int(place[-1]) + 1 if place.device.type == "cpu" and len(place) else len(place)


def _on_the_host(numbers: Tensor) -> list[int]:
    """Reads whole numbers in a single wait for the device."""
    return numbers.tolist()


class TouchedRows:
    """The distinct classes of many contributions to a gradient, and sums of the contributions to each class.

    Costs a sort of the P ids, and no work that grows with C. Waits once for an accelerator, for the number of classes.

    Args:
        ids: the class of each contribution, ``[P]``.
        sizes: length of each contribution, non-negative, ``[P]``, float32 or wider; needed with ``updates``.
        updates: samples classes in proportion to the sum of their sizes. The sums of these classes are weighted so
            that they stay unbiased. None: all classes are kept.

    Attributes:
        ids: the distinct classes that are kept, ascending, ``[U]``.
    """

    def __init__(self, ids: Tensor, sizes: Tensor | None = None, updates: Updates | None = None):
        in_order, order = _sorted(ids)
        is_first = torch.ones_like(in_order, dtype=torch.bool)
        torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
        place = factors = None
        if updates is not None and updates.number < len(ids):
            numbers = is_first.cumsum(0)
            place = numbers - 1
        if place is not None and updates.number < (most := _most_classes(place)):
            sums = sizes.new_zeros(most).index_add_(0, place, sizes.index_select(0, order))
            count = None if ids.device.type == "cpu" else numbers[-1:]
            factors = updates.weights(sums, count).index_select(0, place)
            both = torch.empty(2, len(ids), dtype=torch.bool, device=ids.device)
            is_kept = torch.ne(factors, 0, out=both[1])
            torch.logical_and(is_first, is_kept, out=both[0])
            number, contributions = _on_the_host(both.sum(1))
            kept = true_places(is_kept, contributions)
            in_order, order, is_first, factors = (
                values.index_select(0, kept) for values in (in_order, order, is_first, factors)
            )
        else:
            (number,) = _on_the_host(is_first.sum(0, keepdim=True))
        self._order, self._is_first, self._factors = order, is_first, factors
        self._starts = true_places(is_first, number)
        self.ids = in_order.index_select(0, self._starts)

    def weight_rows(self, vectors: Tensor, which: Tensor, scales: Tensor) -> Tensor:
        """Sums the rows of the weight's gradient, ``[U, d]``.

        Args:
            vectors: ``[V, d]``.
            which: the vector of each contribution, ``[P]``.
            scales: the factor of the vector, ``[P]``.
        """
        which, scales = which.index_select(0, self._order), self._weighted(scales).to(vectors.dtype)
        if uses_triton(vectors.device):
            from hf_dis.head.triton_rows import segment_rows

            return segment_rows(vectors, which, scales, F.pad(self._starts, (0, 1), value=len(which)), vectors.dtype)
        return F.embedding_bag(which, vectors, self._starts, mode="sum", per_sample_weights=scales)

    def bias_rows(self, values: Tensor) -> Tensor:
        """Sums the entries of the bias's gradient, ``[U]``.

        Args:
            values: of each contribution, ``[P]``, float32 or wider.
        """
        values = self._weighted(values)
        return values.new_zeros(len(self.ids)).index_add_(0, self._is_first.cumsum(0) - 1, values)

    def gradient(self, rows: Tensor, parameter_shape: torch.Size, sparse: bool) -> Tensor:
        """Makes the rows a gradient of a parameter: a coalesced sparse COO tensor, or dense and zero elsewhere."""
        if sparse:
            return sparse_rows(self.ids, rows, parameter_shape)
        return rows.new_zeros(parameter_shape).index_copy_(0, self.ids, rows)

    def _weighted(self, values: Tensor) -> Tensor:
        """The values of the contributions that are kept, by class, times the weights of their classes."""
        values = values.index_select(0, self._order)
        return values if self._factors is None else values * self._factors
