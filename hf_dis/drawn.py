"""The product ``h Wᵀ + b`` of an output head at drawn classes only, with gradients of the drawn rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import by_row, by_tail, of_rows
from .sparse import TouchedRows

# Elements of the gathered rows [n, K, d] that exist at a time: 1 MiB in float32, so that they stay in the cache.
GATHER_ELEMENTS = 2**18


class _DrawnLinear(torch.autograd.Function):
    """``h Wᵀ + b`` at drawn classes, forward by chunks of rows, so that no ``[N, K, d]`` is held."""

    @staticmethod
    def forward(ctx, features, weight, bias, row_ids, shared_ids, row_sparse):
        ctx.save_for_backward(features, weight, row_ids, shared_ids)
        ctx.has_bias, ctx.row_sparse = bias is not None, row_sparse
        num_row = row_ids.shape[1]
        logits = features.new_empty(len(features), num_row + shared_ids.shape[1])
        for rows in _chunks(row_ids, weight):
            gathered = F.embedding(row_ids[rows], weight).to(features.dtype)
            torch.linalg.vecdot(gathered, features[rows, None], out=logits[rows, :num_row])
        tails = by_tail(features, len(shared_ids)) @ F.embedding(shared_ids, weight).to(features.dtype).mT
        if bias is not None:
            logits[:, :num_row] += bias[row_ids]
            tails += bias[shared_ids][:, None]
        logits[:, num_row:] = by_row(tails, len(logits))
        return logits

    @staticmethod
    def backward(ctx, grad):
        features, weight, row_ids, shared_ids = ctx.saved_tensors
        row_grad, shared_grad = grad.split([row_ids.shape[1], shared_ids.shape[1]], dim=1)
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_features = grad_weight = grad_bias = None
        if wants_features:
            scales = row_grad.to(weight.dtype)
            grad_features = F.embedding_bag(row_ids, weight, mode="sum", per_sample_weights=scales).to(grad.dtype)
            tails = by_tail(shared_grad, len(shared_ids)) @ weight[shared_ids].to(grad.dtype)
            grad_features += by_row(tails, len(grad))
        if wants_weight or wants_bias:
            touched = TouchedRows(row_ids, shared_ids)
        if wants_weight:
            rows = touched.weight_rows(features, row_grad, shared_grad, weight.dtype)
            grad_weight = touched.gradient(rows, weight.shape, ctx.row_sparse)
        if ctx.has_bias and wants_bias:
            rows = touched.bias_rows(row_grad, shared_grad, weight.dtype)
            grad_bias = touched.gradient(rows, weight.shape[:1], ctx.row_sparse)
        return grad_features, grad_weight, grad_bias, None, None, None


def _chunks(row_ids: Tensor, weight: Tensor) -> Iterator[slice]:
    chunk_rows = max(1, GATHER_ELEMENTS // max(1, row_ids.shape[1] * weight.shape[1]))
    return (slice(start, start + chunk_rows) for start in range(0, len(row_ids), chunk_rows))


def drawn_columns(logits: Tensor, row_ids: Tensor, shared_ids: Tensor) -> Tensor:
    """The same columns of logits of all classes, ``[N, R + K_t]`` for logits ``[N, C]``."""
    return torch.cat([logits.gather(1, row_ids), logits.gather(1, of_rows(shared_ids, 0, len(logits)))], 1)


def drawn_logits(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_ids: Tensor,
    shared_ids: Tensor,
    row_sparse: bool = False,
) -> Tensor:
    """The head's logits at drawn classes only: ``[N, R + K_t]``, in the autocast dtype where autocast is on.

    Args:
        features: what the head is given, ``[N, d]``.
        weight, bias: the head's, ``[C, d]`` and ``[C]`` or None.
        row_ids: classes of each row, ``[N, R]``.
        shared_ids: classes of each tail, ``[G, K_t]``; row i uses tail ``i mod G``.
        row_sparse: give weight and bias sparse gradients, which hold the drawn rows only.

    Raises:
        IndexError: if a class id is not one of the head's; on CPU, an accelerator asserts it by itself.
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features = features.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _DrawnLinear.apply(features, weight, bias, row_ids, shared_ids, row_sparse)
