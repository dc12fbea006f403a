"""Gradients of an output head at sampled classes: sums per touched row, coalescing and clipping."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dis.sampling.designs import Updates


def coalesced(gradient: Tensor) -> Tensor:
    """Returns a sparse gradient with each row once, in ascending order.

    Clipping and unscaling drop the mark of a coalesced tensor. Comparing the ids costs a fraction of sorting again.

    Args:
        gradient: sparse COO, with one sparse dimension.
    """
    ids = gradient._indices()
    if not gradient.is_coalesced() and bool((ids[0, 1:] > ids[0, :-1]).all()):
        return torch.sparse_coo_tensor(
            ids, gradient._values(), gradient.shape, check_invariants=False, is_coalesced=True
        )
    return gradient.coalesce()


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clips gradients as ``torch.nn.utils.clip_grad_norm_``, with row-sparse ones scaled in place, not copied.

    Args:
        parameters: their sparse gradients have to be coalesced.
        max_norm: of all gradients together, above 0.

    Returns:
        the norm before clipping, a scalar.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    dense = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(dense)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in dense:
        gradient.mul_(factor.to(gradient.device))
    return norm


def _sorted(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts ids ``[P]``; returns them with their former places. Equal ids keep their order."""
    if ids.device.type != "cpu":
        return ids.sort(stable=True)
    # numpy sorts integers by vector instructions, but has no such sort with places: packing both takes half the time.
    bits = len(ids).bit_length()
    both = torch.from_numpy(np.sort((ids << bits | torch.arange(len(ids))).numpy()))
    return both >> bits, both & 2**bits - 1


class TouchedRows:
    """The distinct classes of many contributions to a gradient, and sums of the contributions to each class.

    Costs a sort of the P ids, and no work that grows with C. Counting the distinct classes waits for an accelerator.

    Args:
        ids: the class of each contribution, ``[P]``.

    Attributes:
        ids: the distinct classes, ascending, ``[U]``.
    """

    def __init__(self, ids: Tensor):
        in_order, self._order = _sorted(ids)
        self.ids, self._place, self._counts = in_order.unique_consecutive(return_inverse=True, return_counts=True)
        self._weights: Tensor | None = None

    def sampled(self, sizes: Tensor, updates: Updates) -> TouchedRows:
        """Samples classes in proportion to their size; their sums are weighted so that they stay unbiased.

        Args:
            sizes: length of each contribution, non-negative, ``[P]``, float32 or wider.
            updates: the number of classes to keep, and the start of the sample.

        Returns:
            the classes that were kept; ``self`` where that is all of them.
        """
        if updates.number >= len(self.ids):
            return self
        kept, weights = updates.sample(self._sums(sizes))
        some, is_kept = copy(self), torch.zeros_like(self.ids, dtype=torch.bool).index_fill_(0, kept, True)
        some.ids, some._counts, some._weights = self.ids[kept], self._counts[kept], weights
        some._order = self._order.masked_select(is_kept.index_select(0, self._place))
        some._place = torch.arange(len(kept), device=kept.device).repeat_interleave(some._counts)
        return some

    def weight_rows(self, vectors: Tensor, which: Tensor, scales: Tensor) -> Tensor:
        """Sums the rows of the weight's gradient, ``[U, d]``.

        Args:
            vectors: ``[V, d]``.
            which: the vector of each contribution, ``[P]``.
            scales: the factor of the vector, ``[P]``.
        """
        which, scales = (values.index_select(0, self._order) for values in (which, scales))
        if self._weights is not None:
            scales = (scales * self._weights.index_select(0, self._place)).to(vectors.dtype)
        starts = self._counts.cumsum(0) - self._counts
        return F.embedding_bag(which, vectors, starts, mode="sum", per_sample_weights=scales)

    def bias_rows(self, values: Tensor) -> Tensor:
        """Sums the entries of the bias's gradient, ``[U]``.

        Args:
            values: of each contribution, ``[P]``, float32 or wider.
        """
        sums = self._sums(values)
        return sums if self._weights is None else sums * self._weights

    def gradient(self, rows: Tensor, parameter_shape: torch.Size, sparse: bool) -> Tensor:
        """Makes the rows a gradient of a parameter: a coalesced sparse COO tensor, or dense and zero elsewhere."""
        if sparse:
            return torch.sparse_coo_tensor(
                self.ids[None], rows, parameter_shape, check_invariants=False, is_coalesced=True
            )
        return rows.new_zeros(parameter_shape).index_copy_(0, self.ids, rows)

    def _sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.ids)).index_add_(0, self._place, values.index_select(0, self._order))
