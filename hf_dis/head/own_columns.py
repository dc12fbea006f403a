"""The columns of a sample whose classes one process holds: ``h Wᵀ + b`` there, and zero elsewhere.

The work grows with the number of these columns, so processes that hold equal parts of a head share the work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.head.row_gradients import TouchedRows
from hf_dis.sampling.designs import Updates
from hf_dis.sampling.tails import by_item, by_tail

# Elements of the gathered rows [q, d] that exist at a time: 1 MiB in float32 stays in a processor's cache, and 1 GiB
# elsewhere, where few launches matter.
CPU_ELEMENTS, DEVICE_ELEMENTS = 2**18, 2**28


class Columns(NamedTuple):
    """The columns of a sample whose classes are among the first rows of a shard, and where the columns are.

    Attributes:
        places: of the items' own columns among all N·R, ascending, ``[Q]``.
        items: the item of each, ``[Q]``.
        rows: the row of the shard of each, ``[Q]``.
        ends: the number of these columns of the items up to each one, ``[N + 1]``.
        tail_places: columns of each tail, ``[T, M]``; M is the most that a tail has in the shard.
        tail_rows: their rows of the shard, ``[T, M]``.
        in_tail: true where the entry stands for a column, ``[T, M]``.
        share: of the columns of all shards.
    """

    places: Tensor
    items: Tensor
    rows: Tensor
    ends: Tensor
    tail_places: Tensor
    tail_rows: Tensor
    in_tail: Tensor
    share: float

    @classmethod
    def of(cls, item_ids: Tensor, tail_ids: Tensor, start: int, size: int) -> Columns:
        """Finds the columns of classes ``start..start+size-1``.

        Args:
            item_ids, tail_ids: as for :func:`own_columns`.
            start: the first class of the shard.
            size: the number of its classes.
        """
        local = item_ids - start
        is_own = (local >= 0) & (local < size)
        places = is_own.flatten().nonzero()[:, 0]
        ends = F.pad(is_own.sum(1).cumsum(0), (1, 0))
        bounds = torch.tensor([[start, start + size]], device=tail_ids.device).expand(len(tail_ids), -1).contiguous()
        first, last = torch.searchsorted(tail_ids.contiguous(), bounds).unbind(1)
        used = (item_ids >= 0).sum() + (tail_ids >= 0).sum()
        width, all_used, own_of_tails = torch.stack([(last - first).amax(), used, (last - first).sum()]).tolist()
        tail_places = first[:, None] + torch.arange(width, device=tail_ids.device)
        in_tail = tail_places < last[:, None]
        tail_places.clamp_(max=max(0, tail_ids.shape[1] - 1))
        tail_rows = (tail_ids.gather(1, tail_places) - start).clamp_(0, size - 1)
        items = places.div(max(1, item_ids.shape[1]), rounding_mode="floor")
        share = (len(places) + own_of_tails) / max(1, all_used)
        return cls(places, items, local.flatten()[places], ends, tail_places, tail_rows, in_tail, share)


def own_columns(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    item_ids: Tensor,
    tail_ids: Tensor,
    start: int,
    row_sparse: bool = False,
    updates: Updates | None = None,
    divisor: int = 1,
) -> Tensor:
    """Computes a head's logits at sampled classes that a shard holds, and zero at all other classes.

    Args:
        features: the head's input, ``[N, d]``.
        weight, bias: rows of the head from class ``start`` on, ``[S, d]`` and ``[S]`` or None.
        item_ids: classes of each item, ``[N, R]``; -1: none.
        tail_ids: classes of each tail, ascending, ``[T, K_t]``; item i uses tail ``i mod T``. A tail of -1 has none.
        start: the first class of the shard.
        row_sparse: give weight and bias sparse gradients.
        updates: the sample of the classes of all shards whose rows get a gradient; None: all of them. The shard takes
            its share.
        divisor: of the gradients of weight and bias.

    Returns:
        ``[N, R + K_t]``, of the type of the features.
    """
    columns = Columns.of(item_ids, tail_ids, start, len(weight))
    if updates is not None:
        updates = updates._replace(number=max(1, round(updates.number * columns.share)))
    sizes = item_ids.shape[1], tail_ids.shape[1]
    return _OwnColumns.apply(features, weight, bias, columns, sizes, row_sparse, updates, divisor)


class _OwnColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, columns, sizes, row_sparse, updates, divisor):
        ctx.save_for_backward(features, weight)
        ctx.columns, ctx.sizes, ctx.row_sparse, ctx.updates, ctx.divisor = columns, sizes, row_sparse, updates, divisor
        ctx.bias_dtype = None if bias is None else bias.dtype
        num_items, num_tails = len(features), len(columns.tail_rows)
        own = features.new_zeros(num_items * sizes[0])
        products = _products(features, weight, columns)
        rows = F.embedding(columns.tail_rows, weight).to(features.dtype)
        tails = by_tail(features, num_tails) @ rows.mT
        if bias is not None:
            products += bias[columns.rows].to(products.dtype)
            tails += bias[columns.tail_rows][:, None].to(tails.dtype)
        own[columns.places] = products.to(own.dtype)
        tails = tails * columns.in_tail[:, None]
        shared = tails.new_zeros(*tails.shape[:2], sizes[1])
        shared.scatter_add_(2, columns.tail_places[:, None].expand_as(tails), tails)
        return torch.cat([own.view(num_items, sizes[0]), by_item(shared, num_items)], 1)

    @staticmethod
    def backward(ctx, grad):
        (features, weight), columns = ctx.saved_tensors, ctx.columns
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        own, shared = grad.split(ctx.sizes, 1)
        own = own.flatten()[columns.places]
        tails = by_tail(shared, len(columns.tail_rows))
        tails = tails.gather(2, columns.tail_places[:, None].expand(*tails.shape[:2], -1)) * columns.in_tail[:, None]
        grad_features = grad_weight = grad_bias = None
        if wants_features:
            grad_features = _features_gradient(own, tails, weight, columns, features)
        if wants_weight or wants_bias:
            grad_weight, grad_bias = _head_gradients(ctx, own, tails, features, weight)
        return (grad_features, grad_weight if wants_weight else None, grad_bias if wants_bias else None, *[None] * 5)


def _products(features: Tensor, weight: Tensor, columns: Columns) -> Tensor:
    """``h wᵀ`` of each of the items' own columns, ``[Q]``, float32 or wider."""
    on_cpu = features.device.type == "cpu" and features.dtype in (torch.float32, torch.float64)
    fits = on_cpu and features.dtype == weight.dtype and weight.is_contiguous() and len(columns.rows)
    # A class may be twice in an item, but an item cannot have more columns here than the shard has classes.
    if fits and columns.ends.diff().amax() <= len(weight):
        zeros, size = features.new_zeros(len(columns.rows)), (len(features), len(weight))
        places = torch.sparse_csr_tensor(columns.ends, columns.rows, zeros, size, check_invariants=False)
        torch.sparse.sampled_addmm(places, features, weight.mT, beta=0, out=places)
        return places.values()
    wide = torch.promote_types(features.dtype, torch.float32)
    products = features.new_empty(len(columns.rows), dtype=wide)
    elements = CPU_ELEMENTS if features.device.type == "cpu" else DEVICE_ELEMENTS
    parts = (values.split(max(1, elements // weight.shape[1])) for values in (columns.rows, columns.items, products))
    for rows, items, found in zip(*parts, strict=True):
        torch.sum(weight[rows].to(wide) * features[items].to(wide), 1, out=found)
    return products


def _features_gradient(own: Tensor, tails: Tensor, weight: Tensor, columns: Columns, features: Tensor) -> Tensor:
    """The rows of the shard times the gradients on their logits, ``[N, d]``.

    Args:
        own: of the items' own columns, ``[Q]``.
        tails: of the tails' columns, ``[T, n, M]``.
        weight, columns, features: as for the product.
    """
    rows = F.embedding(columns.tail_rows, weight).to(tails.dtype)
    of_tails = by_item(tails @ rows, len(features))
    if not len(own):
        return of_tails.to(features.dtype, copy=True)
    given = {"per_sample_weights": own.to(weight.dtype), "mode": "sum"}
    found = F.embedding_bag(columns.rows, weight, columns.ends[:-1].contiguous(), **given)
    return (found.to(features.dtype)).add_(of_tails)


def _head_gradients(ctx, own: Tensor, tails: Tensor, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight and bias, divided by the divisor."""
    columns, dtype = ctx.columns, weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    of_tails = (tails.mT @ by_tail(features, len(columns.tail_rows))).flatten(0, 1)
    vectors = torch.cat([features, of_tails]).to(dtype)
    kept = columns.in_tail.flatten().nonzero()[:, 0]
    ids = torch.cat([columns.rows, columns.tail_rows.flatten()[kept]])
    which = torch.cat([columns.items, len(features) + kept])
    scales = torch.cat([own.to(wide), torch.ones_like(kept, dtype=wide)]).div_(ctx.divisor)
    sums = torch.cat([own.to(wide), tails.sum(1, dtype=wide).flatten()[kept]]).div_(ctx.divisor)
    sizes = None
    if ctx.updates is not None:
        sizes = scales.abs() * torch.linalg.vector_norm(vectors, dim=1, dtype=wide).index_select(0, which)
    touched = TouchedRows(ids, sizes, ctx.updates)
    rows = touched.weight_rows(vectors, which, scales.to(dtype))
    grad_weight = touched.gradient(rows, weight.shape, ctx.row_sparse)
    if ctx.bias_dtype is None:
        return grad_weight, None
    entries = touched.bias_rows(sums).to(ctx.bias_dtype)
    return grad_weight, touched.gradient(entries, weight.shape[:1], ctx.row_sparse)
