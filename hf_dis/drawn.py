"""The product ``h Wᵀ + b`` of an output head at drawn classes only, with gradients of the drawn rows."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampling import Updates, by_row, by_tail, of_rows
from .sparse import TouchedRows

# torch says so at the first CSR tensor, whatever it is used for.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

# Elements of the gathered rows [n, K, d] that exist at a time: 1 MiB in float32, so that they stay in the cache.
GATHER_ELEMENTS = 2**18


class _DrawnLinear(torch.autograd.Function):
    """``h Wᵀ + b`` at drawn classes; no ``[N, K, d]`` is held."""

    @staticmethod
    def forward(ctx, features, weight, bias, row_ids, shared_ids, row_sparse, updates):
        ctx.save_for_backward(features, weight, row_ids, shared_ids)
        ctx.has_bias, ctx.row_sparse, ctx.updates = bias is not None, row_sparse, updates
        num_row = row_ids.shape[1]
        logits = features.new_empty(len(features), num_row + shared_ids.shape[1])
        _row_products(features, weight, row_ids, out=logits[:, :num_row])
        tails = by_tail(features, len(shared_ids)) @ F.embedding(shared_ids, weight).to(features.dtype).mT
        if bias is not None:
            logits[:, :num_row] += bias.take(row_ids)
            tails += bias.take(shared_ids)[:, None]
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
            tails = by_tail(shared_grad, len(shared_ids)) @ F.embedding(shared_ids, weight).to(grad.dtype)
            grad_features += by_row(tails, len(grad))
        if wants_weight or wants_bias:
            of_head = _Contributions.of(features, row_ids, shared_ids, row_grad, shared_grad, weight.dtype)
            touched = TouchedRows(of_head.ids)
            if ctx.updates is not None:
                touched = touched.drawn(of_head.sizes(), ctx.updates)
        if wants_weight:
            rows = touched.weight_rows(of_head.vectors, of_head.which, of_head.scales)
            grad_weight = touched.gradient(rows, weight.shape, ctx.row_sparse)
        if ctx.has_bias and wants_bias:
            rows = touched.bias_rows(of_head.sums)
            grad_bias = touched.gradient(rows, weight.shape[:1], ctx.row_sparse)
        return grad_features, grad_weight, grad_bias, None, None, None, None


class _Contributions(NamedTuple):
    """What the gradient of the head is summed from: of each class that a row drew alone, a multiple of its features;
    of each class of a tail one vector, of all rows that use it.

    Attributes:
        ids: the class, ``[P]``.
        vectors: ``[N + G·K_t, d]``.
        which: the vector, ``[P]``.
        scales: its factor, ``[P]``.
        sums: the gradients of the logits, summed: what is added to the bias, ``[P]``.
    """

    ids: Tensor
    vectors: Tensor
    which: Tensor
    scales: Tensor
    sums: Tensor

    @classmethod
    def of(cls, features, row_ids, shared_ids, row_grad, shared_grad, dtype: torch.dtype) -> _Contributions:
        num_rows, num_columns = row_ids.shape
        by_tails = by_tail(shared_grad, len(shared_ids))
        of_tails = by_tails.mT @ by_tail(features, len(shared_ids))
        vectors = torch.cat([features, of_tails.flatten(0, 1)]).to(dtype)
        numbers = torch.arange(len(vectors), device=vectors.device)
        alone, sums = row_grad.flatten().to(dtype), by_tails.to(dtype).sum(1).flatten()
        return cls(
            ids=torch.cat([row_ids.flatten(), shared_ids.flatten()]),
            vectors=vectors,
            which=torch.cat([numbers[:num_rows].repeat_interleave(num_columns), numbers[num_rows:]]),
            scales=torch.cat([alone, torch.ones_like(sums)]),
            sums=torch.cat([alone, sums]),
        )

    def sizes(self) -> Tensor:
        """The length of each as a part of the weight's gradient, ``[P]``."""
        return self.scales.abs() * torch.linalg.vector_norm(self.vectors, dim=1).index_select(0, self.which)


def _row_products(features: Tensor, weight: Tensor, row_ids: Tensor, out: Tensor) -> None:
    """``h wᵀ`` of each row with its classes, ``[N, R]``."""
    if not row_ids.numel():
        return
    on_cpu = features.device.type == "cpu" and features.dtype in (torch.float32, torch.float64)
    fits = features.dtype == weight.dtype and weight.is_contiguous() and row_ids.shape[1] <= len(weight)
    if on_cpu and fits:
        # One pass that gathers nothing: half the time. It does not look at the ids, nor mind a class twice in a row.
        lowest, highest = row_ids.aminmax()
        if lowest < 0 or highest >= len(weight):
            raise IndexError(
                f"index out of range: class ids are from {lowest} to {highest}, and the head has {len(weight)} classes"
            )
        row_ends = torch.arange(len(row_ids) + 1) * row_ids.shape[1]
        zeros = features.new_zeros(row_ids.numel())
        size = len(row_ids), len(weight)
        places = torch.sparse_csr_tensor(row_ends, row_ids.flatten(), zeros, size, check_invariants=False)
        torch.sparse.sampled_addmm(places, features, weight.mT, beta=0, out=places)
        out.copy_(places.values().view(row_ids.shape))
        return
    chunk_rows = max(1, GATHER_ELEMENTS // (row_ids.shape[1] * weight.shape[1]))
    for start in range(0, len(row_ids), chunk_rows):
        rows = slice(start, start + chunk_rows)
        gathered = F.embedding(row_ids[rows], weight).to(features.dtype)
        torch.linalg.vecdot(gathered, features[rows, None], out=out[rows])


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
    updates: Updates | None = None,
) -> Tensor:
    """The head's logits at drawn classes only: ``[N, R + K_t]``, in the autocast dtype where autocast is on.

    Args:
        features: what the head is given, ``[N, d]``.
        weight, bias: the head's, ``[C, d]`` and ``[C]`` or None.
        row_ids: classes of each row, ``[N, R]``.
        shared_ids: classes of each tail, ``[G, K_t]``; row i uses tail ``i mod G``.
        row_sparse: give weight and bias sparse gradients, which hold the drawn rows only.
        updates: which of the drawn classes have a part in the gradients of weight and bias; all of them if None.

    Raises:
        IndexError: if a class id is not one of the head's; on CPU, an accelerator asserts it by itself.
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features = features.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _DrawnLinear.apply(features, weight, bias, row_ids, shared_ids, row_sparse, updates)
