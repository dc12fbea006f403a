"""The product ``h Wᵀ + b`` of an output head at sampled classes only, with gradients of the sampled rows of W."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.head.own_columns import own_columns
from hf_dis.head.row_gradients import TouchedRows
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.kernels import uses_triton
from hf_dis.sampling.designs import Updates
from hf_dis.sampling.tails import at_tails, by_item, by_tail, in_turns

# torch warns at the first CSR tensor, whatever the tensor is used for.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")

# Elements of the tails' rows, 32 MiB in bfloat16, up to which backward finds them kept: else it gathers them again.
KEPT_ELEMENTS = 2**24
# Elements of the gathered rows [n, K, d] that exist at a time. On a processor 1 MiB in float32 stays in its cache.
GATHER_ELEMENTS = 2**18
# Elsewhere at most this number of gathers of so many elements and more, 128 MiB in float32; and more gathers only
# beyond 2^28 elements each.
DEVICE_GATHERS, LEAST_GATHERED, MOST_GATHERED = 5, 2**25, 2**28


def sampled_logits(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    item_ids: Tensor,
    tail_ids: Tensor,
    row_sparse: bool = False,
    updates: Updates | None = None,
    shard: VocabShard | None = None,
) -> Tensor:
    """Computes a head's logits at sampled classes only; sums are taken in float32 or wider.

    Args:
        features: the head's input, ``[N, d]``.
        weight, bias: of the head, ``[C, d]`` and ``[C]`` or None.
        item_ids: classes of each item, ``[N, R]``.
        tail_ids: classes of each tail, ``[G, K_t]``; item i uses tail ``i mod G``. Tails of no item are left out.
        row_sparse: give weight and bias sparse gradients, which hold the sampled rows only.
        updates: the sample of these classes whose rows get a gradient; None: all of them.
        shard: the classes of which ``weight`` and ``bias`` hold the rows, ``[S, d]`` and ``[S]``; None: all of them.
            All processes of its group have to give the same features and classes. Each computes the columns of its
            own classes; one sum of ``[N, R + K_t]`` joins the logits, and one of ``[N, d]`` the features' gradient.

    Returns:
        ``[N, R + K_t]``, in the autocast type where autocast is on.

    Raises:
        IndexError: if a class id is outside 0..C-1; on CPU only. Elsewhere torch asserts the range on the device, that
            of an item's own classes not before backward. The kernels of Triton give NaN.
    """
    device, tail_ids = features.device.type, tail_ids[: max(1, len(features))]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    with torch.autocast(device, enabled=False):
        if shard is None:
            return _SampledLinear.apply(features, weight, bias, item_ids, tail_ids, row_sparse, updates, dtype)
        ids = item_ids, tail_ids, shard.start
        features = shard.copied(features.to(dtype))
        return shard.joined(own_columns(features, weight, bias, *ids, row_sparse, updates))


def sampled_columns(logits: Tensor, item_ids: Tensor, tail_ids: Tensor) -> Tensor:
    """Selects the same columns from logits of all classes: ``[N, R + K_t]`` for ``[N, C]``."""
    return torch.cat([logits.gather(1, item_ids), at_tails(logits, tail_ids)], 1)


def weighted_rows(scales: Tensor, weight: Tensor, item_ids: Tensor, tail_ids: Tensor) -> Tensor:
    """Sums the rows of the sampled classes of each item, times their scales: ``[N, d]``.

    Args:
        scales: ``[N, R + K_t]``.
        weight: of the head, ``[C, d]``.
        item_ids, tail_ids: as for :func:`sampled_logits`.
    """
    tail_ids = tail_ids[: max(1, len(scales))]
    own, shared = scales.split([item_ids.shape[1], tail_ids.shape[1]], dim=1)
    tails = by_tail(shared, len(tail_ids)) @ _tail_rows(weight, tail_ids, scales.dtype)
    return _features_gradient(own, weight, item_ids, tails, scales.dtype)


class _SampledLinear(torch.autograd.Function):
    """``h Wᵀ + b`` at sampled classes; ``[N, K, d]`` is never held."""

    @staticmethod
    def forward(ctx, features, weight, bias, item_ids, tail_ids, row_sparse, updates, dtype):
        # The gradient has the type of what is given, without another pass that would widen it.
        ctx.features_dtype, features = features.dtype, features.to(dtype)
        by_kernels = uses_triton(features.device)
        rows = _tail_rows(weight, tail_ids, features.dtype)
        is_kept = by_kernels or rows.numel() <= KEPT_ELEMENTS  # without kernels memory is scarcer
        ctx.save_for_backward(features, weight, item_ids, tail_ids, rows if is_kept else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.row_sparse, ctx.updates = row_sparse, updates
        ctx.numbers = None if by_kernels else _numbers(item_ids, tail_ids)
        num_own = item_ids.shape[1]
        tails = by_tail(features, len(tail_ids)) @ rows.mT
        if bias is not None:
            tails += bias.take(tail_ids)[:, None]
        if by_kernels:
            from hf_dis.head.triton_products import item_products

            logits = item_products(features, weight, item_ids, tails, features.dtype)
        else:
            logits = features.new_empty(len(features), num_own + tail_ids.shape[1])
            _item_products(features, weight, item_ids, ctx.numbers[0], out=logits[:, :num_own])
            _write(logits[:, num_own:], tails)
        if bias is not None:
            logits[:, :num_own] += bias.take(item_ids)
        return logits

    @staticmethod
    def backward(ctx, grad):
        features, weight, item_ids, tail_ids, rows = ctx.saved_tensors
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_features = grad_weight = grad_bias = None
        by_kernels, wants_head = uses_triton(grad.device), wants_weight or wants_bias
        item_grad, tail_grad = grad.split([item_ids.shape[1], tail_ids.shape[1]], dim=1)
        if wants_head and not by_kernels:
            scales, item_grad = _scales(item_grad, tail_ids, weight.dtype)
        if wants_features:
            rows = _tail_rows(weight, tail_ids, grad.dtype) if rows is None else rows
            tails = by_tail(tail_grad, len(tail_ids)) @ rows
            grad_features = _features_gradient(item_grad, weight, item_ids, tails, ctx.features_dtype)
            del rows, tails  # the gradient of W is computed without them in memory
        if wants_head and by_kernels:
            from hf_dis.head.triton_gradients import HeadGradients

            found = HeadGradients(features, item_ids, tail_ids, item_grad, tail_grad, ctx.updates)
            if wants_weight:
                grad_weight = found.weight(weight, ctx.row_sparse)
            if wants_bias:
                grad_bias = found.bias(len(weight), ctx.bias_dtype, ctx.row_sparse)
            return grad_features, grad_weight, grad_bias, *[None] * 5
        if wants_head:
            of_head = _Contributions.of(features, item_ids, tail_ids, ctx.numbers, scales, tail_grad, weight.dtype)
            is_sampled = ctx.updates is not None and ctx.updates.number < len(of_head.ids)
            touched = TouchedRows(of_head.ids, of_head.sizes() if is_sampled else None, ctx.updates)
        if wants_weight:
            rows = touched.weight_rows(of_head.vectors, of_head.which, of_head.scales)
            grad_weight = touched.gradient(rows, weight.shape, ctx.row_sparse)
        if wants_bias:
            rows = touched.bias_rows(of_head.sums()).to(ctx.bias_dtype)
            grad_bias = touched.gradient(rows, weight.shape[:1], ctx.row_sparse)
        return grad_features, grad_weight, grad_bias, *[None] * 5


class _Contributions(NamedTuple):
    """The P contributions that the gradient of a head is summed from.

    A class of a single item contributes a multiple of the item's features. A class of a tail contributes one vector,
    which is summed over all items that use the tail.

    Attributes:
        ids: the class of each contribution, ``[P]``.
        vectors: the features of the items, then the vectors of the tails' classes, ``[N + G·K_t, d]``.
        which: the vector of each contribution, ``[P]``.
        scales: the factor of the vector, ``[P]``.
        alone: the gradient on the logits of single items' classes, ``[N·R]``.
        tails: the gradient on the logits of the tails' classes, by tail, ``[G, n, K_t]``.
    """

    ids: Tensor
    vectors: Tensor
    which: Tensor
    scales: Tensor
    alone: Tensor
    tails: Tensor

    @classmethod
    def of(cls, features, item_ids, tail_ids, numbers, scales, tail_grad, dtype) -> _Contributions:
        num_items = len(item_ids)
        by_tails = by_tail(tail_grad, len(tail_ids))
        of_tails = by_tails.mT @ by_tail(features, len(tail_ids))
        vectors = features.new_empty(num_items + tail_ids.numel(), features.shape[1], dtype=dtype)
        torch.cat([features, of_tails.flatten(0, 1)], out=vectors)  # widens as it writes
        return cls(
            ids=torch.cat([item_ids.flatten(), tail_ids.flatten()]),
            vectors=vectors,
            which=torch.cat(numbers),
            scales=scales,
            alone=scales[: item_ids.numel()],
            tails=by_tails,
        )

    def sums(self) -> Tensor:
        """Sums the gradient on the logits over items: the part in the bias, ``[P]``, float32 or wider."""
        # A sum in bfloat16 stops growing at 256 times its terms.
        wide = torch.promote_types(self.vectors.dtype, torch.float32)
        return torch.cat([self.alone.to(wide), self.tails.sum(1, dtype=wide).flatten()])

    def sizes(self) -> Tensor:
        """Computes the length of each part of the weight's gradient, ``[P]``, float32 or wider."""
        wide = torch.promote_types(self.vectors.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(self.vectors, dim=1, dtype=wide)
        return self.scales.abs() * lengths.index_select(0, self.which)


def _numbers(item_ids: Tensor, tail_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers items and classes of tails, 0..N + G·K_t - 1: items once for each of their classes, ``[N·R]``."""
    num_items = len(item_ids)
    items, tails = torch.arange(num_items + tail_ids.numel(), device=item_ids.device).tensor_split([num_items])
    return items[:, None].expand_as(item_ids).flatten(), tails


def _scales(item_grad: Tensor, tail_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales of :class:`_Contributions` in a type or wider, and the gradient among them, ``[N, R]``."""
    number = item_grad.numel() + tail_ids.numel()
    scales = item_grad.new_ones(number, dtype=torch.promote_types(item_grad.dtype, dtype))
    return scales, scales[: item_grad.numel()].view(item_grad.shape).copy_(item_grad)


def _item_products(features: Tensor, weight: Tensor, item_ids: Tensor, item_numbers: Tensor, out: Tensor) -> None:
    """Writes ``h wᵀ`` of each item with its classes into ``out``, ``[N, R]``."""
    if not item_ids.numel():
        return
    on_cpu = features.device.type == "cpu" and features.dtype in (torch.float32, torch.float64)
    fits = features.dtype == weight.dtype and weight.is_contiguous() and item_ids.shape[1] <= len(weight)
    if on_cpu and fits:
        # One pass that gathers nothing takes half the time. It accepts a class twice in an item, and checks no ids.
        lowest, highest = item_ids.aminmax()
        if lowest < 0 or highest >= len(weight):
            raise IndexError(
                f"index out of range: class ids are from {lowest} to {highest}, and the head has {len(weight)} "
                f"classes; sample from 0..{len(weight) - 1}"
            )
        ends = torch.arange(len(item_ids) + 1) * item_ids.shape[1]
        zeros = features.new_zeros(item_ids.numel())
        size = len(item_ids), len(weight)
        places = torch.sparse_csr_tensor(ends, item_ids.flatten(), zeros, size, check_invariants=False)
        torch.sparse.sampled_addmm(places, features, weight.mT, beta=0, out=places)
        out.copy_(places.values().view(item_ids.shape))
        return
    if features.is_cuda and _bags_take(features, weight):
        out.copy_(_bag_products(features, weight, item_ids, item_numbers))
        return
    wide = torch.promote_types(features.dtype, torch.float32)
    size = _gathered_items(len(item_ids), item_ids.shape[1] * weight.shape[1], features.device)
    products = features.new_empty(*item_ids.shape, 1, dtype=wide)
    parts = (values.split(size) for values in (item_ids, features.to(wide)[:, :, None], products))
    for ids, vectors, part in zip(*parts, strict=True):
        torch.bmm(F.embedding(ids, weight).to(wide), vectors, out=part)
    out.copy_(products[:, :, 0])


def _bags_take(features: Tensor, weight: Tensor) -> bool:
    """Returns True if :func:`_bag_products` sums in float32 or wider, and rounds no factor."""
    # The kernel multiplies in the type of W before it adds.
    is_wide = weight.dtype in (torch.float32, torch.float64)
    return is_wide and torch.promote_types(features.dtype, weight.dtype) == weight.dtype


def _bag_products(features: Tensor, weight: Tensor, item_ids: Tensor, bags: Tensor) -> Tensor:
    """Computes ``h wᵀ`` of each item with its classes, ``[N, R]``, in the type of W; one kernel, and no gathered row.

    The products are the gradient of ``embedding_bag`` on the weights of its entries. No class id is checked on a GPU.
    """
    given = features.to(weight.dtype), weight, item_ids.flatten(), bags, bags  # the bag of an entry says it all
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(*given, mode=0).view(item_ids.shape)


def _tail_rows(weight: Tensor, tail_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Gathers the rows of the tails' classes in a type, ``[G, K_t, d]``."""
    if uses_triton(weight.device):
        from hf_dis.models.triton_gathered import gathered_rows

        return gathered_rows(weight, tail_ids, dtype)
    return F.embedding(tail_ids, weight).to(dtype)


def _features_gradient(scales: Tensor, weight: Tensor, item_ids: Tensor, tails: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums the rows of each item's classes, times their scales, and the item's part of ``tails``, ``[N, d]``.

    Args:
        scales, weight, item_ids: of the items, ``[N, R]``, ``[C, d]`` and ``[N, R]``.
        tails: the parts of the tails' classes, by tail, ``[G, n, d]``.
        dtype: of the result.
    """
    if uses_triton(weight.device):
        from hf_dis.head.triton_products import features_gradient

        return features_gradient(scales, weight, item_ids, tails, dtype)
    # A weight that takes a gradient would cost further launches, for a backward that is never called.
    own = F.embedding_bag(item_ids, weight.detach(), mode="sum", per_sample_weights=scales.to(weight.dtype))
    gradient, num_tails = scales.new_empty(own.shape, dtype=dtype), len(tails)
    if len(own) % num_tails:
        return torch.add(own, by_item(tails, len(own)), out=gradient)  # rounds once
    by_turns = (in_turns(values, num_tails) for values in (own, gradient))
    torch.add(next(by_turns), tails.transpose(0, 1), out=next(by_turns))
    return gradient


def _write(out: Tensor, tails: Tensor) -> None:
    """Writes the columns of the tails, ``[G, n, K_t]``, into those of the items, ``[N, K_t]``."""
    if len(out) % len(tails):
        out.copy_(by_item(tails, len(out)))
    else:
        in_turns(out, len(tails)).copy_(tails.transpose(0, 1))  # no copy between


def _gathered_items(num_items: int, elements: int, device: torch.device) -> int:
    """Counts the items whose rows are gathered at a time, for the number of elements of an item."""
    if device.type == "cpu":
        return max(1, GATHER_ELEMENTS // elements)
    least, most = (max(1, size // elements) for size in (LEAST_GATHERED, MOST_GATHERED))
    return min(max(least, -(-num_items // DEVICE_GATHERS)), most)
