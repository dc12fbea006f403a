"""Gradients of an output head at drawn classes: the rows that were drawn, and nothing of the size of the head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sampling import by_tail


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


class TouchedRows:
    """The distinct classes of a draw, and sums over the places where each was drawn.

    Costs a sort of the N·R + G·K_t drawn ids, and no work that grows with C. Finding how many are distinct waits for
    an accelerator.

    Args:
        row_ids: classes of each row, ``[N, R]``.
        shared_ids: classes of each tail, ``[G, K_t]``; row i uses tail ``i mod G``.

    Attributes:
        ids: the distinct classes, ascending, ``[U]``.
    """

    def __init__(self, row_ids: Tensor, shared_ids: Tensor):
        self.num_rows, self.num_columns = row_ids.shape
        self.num_tails = len(shared_ids)
        in_order, self._order = torch.cat([row_ids.flatten(), shared_ids.flatten()]).sort(stable=True)
        self.ids, self._place, counts = in_order.unique_consecutive(return_inverse=True, return_counts=True)
        self._starts = counts.cumsum(0) - counts

    def weight_rows(self, features: Tensor, row_grad: Tensor, shared_grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight's gradient, ``[U, d]``.

        Args:
            features: what the head was given, ``[N, d]``.
            row_grad, shared_grad: gradients of the logits, ``[N, R]`` and ``[N, K_t]``.
            dtype: the weight's.
        """
        # A class's row is the sum of the features of the rows that drew it times their gradients, and of one more
        # vector for each tail that it is in, of all rows that use it.
        of_tails = by_tail(shared_grad, self.num_tails).mT @ by_tail(features, self.num_tails)
        vectors = torch.cat([features, of_tails.flatten(0, 1)]).to(dtype)
        scales = torch.cat([row_grad.flatten(), row_grad.new_ones(len(vectors) - len(features))]).to(dtype)
        num_drawn = self.num_rows * self.num_columns
        vector = torch.where(
            self._order < num_drawn, self._order // max(1, self.num_columns), self._order - num_drawn + self.num_rows
        )
        return F.embedding_bag(vector, vectors, self._starts, mode="sum", per_sample_weights=scales[self._order])

    def bias_rows(self, row_grad: Tensor, shared_grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Entries of the bias's gradient, ``[U]``."""
        of_tails = by_tail(shared_grad.to(dtype), self.num_tails).sum(1)
        gradients = torch.cat([row_grad.flatten().to(dtype), of_tails.flatten()])
        return gradients.new_zeros(len(self.ids)).index_add_(0, self._place, gradients[self._order])

    def gradient(self, rows: Tensor, parameter_shape: torch.Size, sparse: bool) -> Tensor:
        """The rows as a gradient of a parameter: a coalesced sparse COO tensor, or dense and zero elsewhere."""
        if sparse:
            return torch.sparse_coo_tensor(
                self.ids[None], rows, parameter_shape, check_invariants=False, is_coalesced=True
            )
        return rows.new_zeros(parameter_shape).index_copy_(0, self.ids, rows)
