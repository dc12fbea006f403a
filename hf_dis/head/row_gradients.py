"""Gradients of an output head at sampled classes: the rows that were sampled, and nothing of the size of the head."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dis.sampling.designs import Updates


def coalesced(gradient: Tensor) -> Tensor:
    """A sparse gradient with each row in it once, in order.

    Clipping and unscaling forget that it was so; to look costs a fraction of sorting it again.
    """
    ids = gradient._indices()
    if not gradient.is_coalesced() and bool((ids[0, 1:] > ids[0, :-1]).all()):
        return torch.sparse_coo_tensor(
            ids, gradient._values(), gradient.shape, check_invariants=False, is_coalesced=True
        )
    return gradient.coalesce()


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` that scales row-sparse gradients in place, where torch makes a copy.

    Args:
        parameters: their sparse gradients have to be coalesced.
        max_norm: of all gradients together.

    Returns:
        their norm before.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    dense = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    norm = torch.nn.utils.get_total_norm(dense)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in dense:
        gradient.mul_(factor.to(gradient.device))
    return norm


def _sorted(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids, ``[P]``, in ascending order, and where each was; equal ones in the order they had."""
    if ids.device.type != "cpu":
        return ids.sort(stable=True)
    # numpy sorts integers, though not places beside them, by vector instructions: half the time.
    bits = len(ids).bit_length()
    both = torch.from_numpy(np.sort((ids << bits | torch.arange(len(ids))).numpy()))
    return both >> bits, both & 2**bits - 1


class TouchedRows:
    """The distinct classes among those of many contributions to a gradient, and sums of what is contributed to each.

    Costs a sort of the P ids, and no work that grows with C. Finding how many are distinct waits for an accelerator.

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
        """Some of the classes in proportion to their size, whose sums are weighted by its inverse: unbiased.

        Args:
            sizes: how large each contribution is, non-negative, ``[P]``.
        """
        if updates.number >= len(self.ids):
            return self
        kept, weights = updates.sample(self._sums(sizes))
        some, is_kept = copy(self), torch.zeros_like(self.ids, dtype=torch.bool).index_fill_(0, kept, True)
        some.ids, some._counts, some._weights = self.ids[kept], self._counts[kept], weights
        some._order = self._order.masked_select(is_kept.index_select(0, self._place))
        some._place = torch.arange(len(kept), device=kept.device).repeat_interleave(some._counts)
        return some

    def _sums(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.ids)).index_add_(0, self._place, values.index_select(0, self._order))

    def weight_rows(self, vectors: Tensor, which: Tensor, scales: Tensor) -> Tensor:
        """Rows of the weight's gradient, ``[U, d]``.

        Args:
            vectors: ``[V, d]``.
            which: the vector that each contribution is a multiple of, ``[P]``.
            scales: the factors, ``[P]``.
        """
        which, scales = (values.index_select(0, self._order) for values in (which, scales))
        if self._weights is not None:
            scales = scales * self._weights.index_select(0, self._place)
        starts = self._counts.cumsum(0) - self._counts
        return F.embedding_bag(which, vectors, starts, mode="sum", per_sample_weights=scales)

    def bias_rows(self, values: Tensor) -> Tensor:
        """Entries of the bias's gradient, ``[U]``, for the value of each contribution, ``[P]``."""
        sums = self._sums(values)
        return sums if self._weights is None else sums * self._weights

    def gradient(self, rows: Tensor, parameter_shape: torch.Size, sparse: bool) -> Tensor:
        """The rows as a gradient of a parameter: a coalesced sparse COO tensor, or dense and zero elsewhere."""
        if sparse:
            return torch.sparse_coo_tensor(
                self.ids[None], rows, parameter_shape, check_invariants=False, is_coalesced=True
            )
        return rows.new_zeros(parameter_shape).index_copy_(0, self.ids, rows)
