"""The product ``h Wᵀ + b`` of an output head at sampled classes only, with gradients of the sampled rows."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.head.row_gradients import TouchedRows
from hf_dis.sampling.designs import Updates
from hf_dis.sampling.tails import by_item, by_tail, of_items

# torch says so at the first CSR tensor, whatever it is used for.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


# Elements of the gathered rows [n, K, d] that exist at a time: 1 MiB in float32, so that they stay in the cache.
GATHER_ELEMENTS = 2**18


class _SampledLinear(torch.autograd.Function):
    """``h Wᵀ + b`` at sampled classes; no ``[N, K, d]`` is held."""

    @staticmethod
    def forward(ctx, features, weight, bias, item_ids, tail_ids, row_sparse, updates):
        ctx.save_for_backward(features, weight, item_ids, tail_ids)
        ctx.has_bias, ctx.row_sparse, ctx.updates = bias is not None, row_sparse, updates
        num_own = item_ids.shape[1]
        logits = features.new_empty(len(features), num_own + tail_ids.shape[1])
        _row_products(features, weight, item_ids, out=logits[:, :num_own])
        tails = by_tail(features, len(tail_ids)) @ F.embedding(tail_ids, weight).to(features.dtype).mT
        if bias is not None:
            logits[:, :num_own] += bias.take(item_ids)
            tails += bias.take(tail_ids)[:, None]
        logits[:, num_own:] = by_item(tails, len(logits))
        return logits

    @staticmethod
    def backward(ctx, grad):
        features, weight, item_ids, tail_ids = ctx.saved_tensors
        item_grad, shared_grad = grad.split([item_ids.shape[1], tail_ids.shape[1]], dim=1)
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_features = grad_weight = grad_bias = None
        if wants_features:
            scales = item_grad.to(weight.dtype)
            grad_features = F.embedding_bag(item_ids, weight, mode="sum", per_sample_weights=scales).to(grad.dtype)
            tails = by_tail(shared_grad, len(tail_ids)) @ F.embedding(tail_ids, weight).to(grad.dtype)
            grad_features += by_item(tails, len(grad))
        if wants_weight or wants_bias:
            of_head = _Contributions.of(features, item_ids, tail_ids, item_grad, shared_grad, weight.dtype)
            touched = TouchedRows(of_head.ids)
            if ctx.updates is not None:
                touched = touched.sampled(of_head.sizes(), ctx.updates)
        if wants_weight:
            rows = touched.weight_rows(of_head.vectors, of_head.which, of_head.scales)
            grad_weight = touched.gradient(rows, weight.shape, ctx.row_sparse)
        if ctx.has_bias and wants_bias:
            rows = touched.bias_rows(of_head.sums)
            grad_bias = touched.gradient(rows, weight.shape[:1], ctx.row_sparse)
        return grad_features, grad_weight, grad_bias, None, None, None, None


class _Contributions(NamedTuple):
    """What the gradient of the head is summed from: of each class that a row sampled alone, a multiple of its features;
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
    def of(cls, features, item_ids, tail_ids, item_grad, shared_grad, dtype: torch.dtype) -> _Contributions:
        num_items, num_columns = item_ids.shape
        by_tails = by_tail(shared_grad, len(tail_ids))
        of_tails = by_tails.mT @ by_tail(features, len(tail_ids))
        vectors = torch.cat([features, of_tails.flatten(0, 1)]).to(dtype)
        numbers = torch.arange(len(vectors), device=vectors.device)
        alone, sums = item_grad.flatten().to(dtype), by_tails.to(dtype).sum(1).flatten()
        return cls(
            ids=torch.cat([item_ids.flatten(), tail_ids.flatten()]),
            vectors=vectors,
            which=torch.cat([numbers[:num_items].repeat_interleave(num_columns), numbers[num_items:]]),
            scales=torch.cat([alone, torch.ones_like(sums)]),
            sums=torch.cat([alone, sums]),
        )

    def sizes(self) -> Tensor:
        """The length of each as a part of the weight's gradient, ``[P]``."""
        return self.scales.abs() * torch.linalg.vector_norm(self.vectors, dim=1).index_select(0, self.which)


def _row_products(features: Tensor, weight: Tensor, item_ids: Tensor, out: Tensor) -> None:
    """``h wᵀ`` of each row with its classes, ``[N, R]``."""
    if not item_ids.numel():
        return
    on_cpu = features.device.type == "cpu" and features.dtype in (torch.float32, torch.float64)
    fits = features.dtype == weight.dtype and weight.is_contiguous() and item_ids.shape[1] <= len(weight)
    if on_cpu and fits:
        # One pass that gathers nothing: half the time. It does not look at the ids, nor mind a class twice in a row.
        lowest, highest = item_ids.aminmax()
        if lowest < 0 or highest >= len(weight):
            raise IndexError(
                f"index out of range: class ids are from {lowest} to {highest}, and the head has {len(weight)} classes"
            )
        row_ends = torch.arange(len(item_ids) + 1) * item_ids.shape[1]
        zeros = features.new_zeros(item_ids.numel())
        size = len(item_ids), len(weight)
        places = torch.sparse_csr_tensor(row_ends, item_ids.flatten(), zeros, size, check_invariants=False)
        torch.sparse.sampled_addmm(places, features, weight.mT, beta=0, out=places)
        out.copy_(places.values().view(item_ids.shape))
        return
    chunk_rows = max(1, GATHER_ELEMENTS // (item_ids.shape[1] * weight.shape[1]))
    for start in range(0, len(item_ids), chunk_rows):
        rows = slice(start, start + chunk_rows)
        gathered = F.embedding(item_ids[rows], weight).to(features.dtype)
        torch.linalg.vecdot(gathered, features[rows, None], out=out[rows])


def sampled_columns(logits: Tensor, item_ids: Tensor, tail_ids: Tensor) -> Tensor:
    """The same columns of logits of all classes, ``[N, R + K_t]`` for logits ``[N, C]``."""
    return torch.cat([logits.gather(1, item_ids), logits.gather(1, of_items(tail_ids, 0, len(logits)))], 1)


def sampled_logits(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    item_ids: Tensor,
    tail_ids: Tensor,
    row_sparse: bool = False,
    updates: Updates | None = None,
) -> Tensor:
    """The head's logits at sampled classes only: ``[N, R + K_t]``, in the autocast dtype where autocast is on.

    Args:
        features: what the head is given, ``[N, d]``.
        weight, bias: the head's, ``[C, d]`` and ``[C]`` or None.
        item_ids: classes of each row, ``[N, R]``.
        tail_ids: classes of each tail, ``[G, K_t]``; row i uses tail ``i mod G``.
        row_sparse: give weight and bias sparse gradients, which hold the sampled rows only.
        updates: which of the sampled classes have a part in the gradients of weight and bias; all of them if None.

    Raises:
        IndexError: if a class id is not one of the head's; on CPU, an accelerator asserts it by itself.
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        features = features.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _SampledLinear.apply(features, weight, bias, item_ids, tail_ids, row_sparse, updates)
