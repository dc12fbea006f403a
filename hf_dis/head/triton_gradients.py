"""The gradient of an output head at sampled classes by kernels: few launches, and one wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dis.head.row_gradients import sparse_rows
from hf_dis.head.triton_contributions import (
    class_sizes,
    class_starts,
    kept_classes,
    sorted_contributions,
    vector_lengths,
)
from hf_dis.head.triton_rows import segment_rows
from hf_dis.kernels import sum_dtype
from hf_dis.precision import widest
from hf_dis.sampling.designs import CAPPING_STEPS, Updates
from hf_dis.sampling.tails import by_tail


class HeadGradients:
    """The rows of a head's gradient, as :class:`hf_dis.head.row_gradients.TouchedRows` computes them.

    Args:
        features: the head's input, ``[N, d]``.
        item_ids: classes of each item, ``[N, R]``.
        tail_ids: classes of each tail, ``[G, K_t]``; item i uses tail ``i mod G``.
        item_grad, tail_grad: the gradient on the logits, ``[N, R]`` and ``[N, K_t]``.
        updates: the sample of the classes whose rows get a gradient; None: all of them.

    Attributes:
        ids: these classes, ascending, ``[U]``.
    """

    def __init__(
        self,
        features: Tensor,
        item_ids: Tensor,
        tail_ids: Tensor,
        item_grad: Tensor,
        tail_grad: Tensor,
        updates: Updates | None,
    ):
        self._item_grad, self._tails = item_grad, by_tail(tail_grad, len(tail_ids))
        self._features = features
        self._of_tails = (self._tails.mT @ by_tail(features, len(tail_ids))).flatten(0, 1)
        in_order, self._order = torch.cat([item_ids.flatten(), tail_ids.flatten()]).sort(stable=True)
        number, self._wide = len(in_order), sum_dtype(features)
        self._is_sampled = updates is not None and updates.number < number
        lengths = vector_lengths(features, self._of_tails, self._wide) if self._is_sampled else None
        self._which, self._scales, sizes = sorted_contributions(self._order, item_grad, lengths, self._wide)
        self._kept = self._weights = None
        if not number:
            self.ids, self._count, self._starts = in_order, in_order, in_order.new_zeros(1)
            return
        self._count, starts = class_starts(in_order)
        if self._is_sampled:
            given, wide = (class_sizes(sizes, starts), self._count, starts, in_order), widest(in_order.device)
            *kept, num_kept = kept_classes(*given, updates.number, updates.start, CAPPING_STEPS, wide)
            (number,) = num_kept.tolist()
            self._kept, self.ids, self._weights = (values[:number] for values in kept)
            self._starts = starts
        else:
            (number,) = self._count[-1:].tolist()
            self._starts = starts[: number + 1]
            self.ids = in_order.index_select(0, starts[:number])

    def weight(self, weight: Tensor, sparse: bool, factor: Tensor | None = None) -> Tensor:
        """Computes the weight's gradient: a coalesced sparse COO tensor, or dense and zero elsewhere.

        Args:
            weight: of the head, ``[C, d]``.
            sparse: return a sparse tensor.
            factor: of the whole gradient, a scalar; None: 1.
        """
        scales = self._scales if factor is None else self._scales * factor
        given = self._features, self._which, scales, self._starts, weight.dtype
        rows = segment_rows(*given, self._kept, self._weights, self._of_tails)
        return self._gradient(rows, weight.shape, sparse)

    def bias(self, num_classes: int, dtype: torch.dtype, sparse: bool) -> Tensor:
        """Computes the bias's gradient, ``[C]``; terms are summed in float32 or wider."""
        alone, wide = self._item_grad.flatten(), torch.promote_types(self._wide, dtype)
        of_tails = self._tails.sum(1, dtype=wide).flatten()
        values = torch.cat([alone.to(wide), of_tails]).index_select(0, self._order)
        sums = values.new_zeros(len(values) + 1).index_add_(0, self._count, values)[1:]
        is_whole = self._kept is None
        rows = sums[: len(self.ids)] if is_whole else sums.index_select(0, self._kept) * self._weights
        return self._gradient(rows.to(dtype), torch.Size([num_classes]), sparse)

    def _gradient(self, rows: Tensor, shape: torch.Size, sparse: bool) -> Tensor:
        if sparse:
            return sparse_rows(self.ids, rows, shape)
        return rows.new_zeros(shape).index_copy_(0, self.ids, rows)
