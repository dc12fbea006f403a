"""Triton kernels: products of features with sampled rows of W, and their gradient on the features.

The gathered rows ``[N, R, d]`` are never held: a program reads each row straight into its sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, sum_dtype, unit_columns


@triton.jit
def block_products(
    feature, weight, ids, column, num_ids, num_classes, width, weight_stride,
    WIDE: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Computes the products of an item with BLOCK_IDS of its classes; NaN for a class that does not exist.

    The features and the ids are those of the item. The columns are the places of the classes among the ids.
    """
    row = tl.load(ids + column, column < num_ids, -1).to(tl.int64)
    is_class = (row >= 0) & (row < num_classes)
    total = tl.zeros((BLOCK_IDS,), WIDE)
    for start in range(0, width, BLOCK_WIDTH):
        place = start + tl.arange(0, BLOCK_WIDTH)
        inside = place < width
        value = tl.load(feature + place, inside, 0).to(WIDE)
        places = weight + (row * weight_stride)[:, None] + place[None, :]
        vectors = tl.load(places, is_class[:, None] & inside[None, :], 0).to(WIDE)
        total += tl.sum(vectors * value[None, :], 1)
    return tl.where(is_class, total, float("nan"))


@triton.jit
def add_rows(
    total, scales, weight, ids, place, inside, num_ids, num_classes, weight_stride,
    WIDE: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    """Adds the scaled rows of an item at some columns to a total; NaN for a class that does not exist."""
    for start in range(0, num_ids, BLOCK_IDS):
        column = start + tl.arange(0, BLOCK_IDS)
        row = tl.load(ids + column, column < num_ids, -1).to(tl.int64)
        is_class = (row >= 0) & (row < num_classes)
        scale = tl.load(scales + column, column < num_ids, 0).to(WIDE)
        scale = tl.where(is_class | (column >= num_ids), scale, float("nan"))
        places = weight + (row * weight_stride)[:, None] + place[None, :]
        vectors = tl.load(places, is_class[:, None] & inside[None, :], 0).to(WIDE)
        total += tl.sum(vectors * scale[:, None], 0)
    return total


@triton.jit
def products_kernel(
    features,
    weight,
    ids,
    out,
    tails,
    num_ids,
    num_classes,
    width,
    features_stride,
    weight_stride,
    ids_stride,
    num_shared,
    num_tails,
    most_items,
    WIDE: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
):
    """A program computes BLOCK_IDS products of an item, or copies BLOCK_SHARED products with its tail."""
    item = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    num_blocks = tl.cdiv(num_ids, BLOCK_IDS)
    out += item * (num_ids + num_shared)
    if block < num_blocks:
        column = block * BLOCK_IDS + tl.arange(0, BLOCK_IDS)
        feature = features + item * features_stride
        total = block_products(
            feature, weight, ids + item * ids_stride, column, num_ids, num_classes, width, weight_stride,
            WIDE, BLOCK_IDS, BLOCK_WIDTH,
        )  # fmt: skip
        tl.store(out + column, total, column < num_ids)
    else:
        shared = (block - num_blocks) * BLOCK_SHARED + tl.arange(0, BLOCK_SHARED)
        of_tail = tails + (item % num_tails * most_items + item // num_tails) * num_shared
        tl.store(out + num_ids + shared, tl.load(of_tail + shared, shared < num_shared, 0), shared < num_shared)


@triton.jit
def features_gradient_kernel(
    scales,
    weight,
    ids,
    out,
    tails,
    num_ids,
    num_classes,
    width,
    scales_stride,
    weight_stride,
    ids_stride,
    num_tails,
    most_items,
    WIDE: tl.constexpr,
    HAS_TAILS: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A program sums BLOCK_WIDTH columns of the scaled rows of an item, and adds the part of its tail."""
    item = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = place < width
    total = tl.zeros((BLOCK_WIDTH,), WIDE)
    if HAS_TAILS:
        of_tail = item % num_tails * most_items + item // num_tails
        total += tl.load(tails + of_tail * width + place, inside, 0).to(WIDE)
    total = add_rows(
        total, scales + item * scales_stride, weight, ids + item * ids_stride, place, inside,
        num_ids, num_classes, weight_stride, WIDE, BLOCK_IDS,
    )  # fmt: skip
    tl.store(out + item * width + place, total, inside)


@torch.library.custom_op("hf_dis::item_products", mutates_args=())
def item_products(features: Tensor, weight: Tensor, ids: Tensor, tails: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes ``h wᵀ`` of each item with its sampled rows of W, summed in float32 or wider, beside those of its tail.

    Args:
        features: ``[N, d]``.
        weight: ``[C, d]``.
        ids: classes of each item, ``[N, R]``; a class outside 0..C-1 gives NaN.
        tails: products of each tail's items with the tail, ``[G, ceil(N / G), K_t]``; item i is of tail ``i mod G``.
        dtype: of the result.

    Returns:
        ``[N, R + K_t]``.
    """
    features, weight, ids = unit_columns(features), unit_columns(weight), unit_columns(ids)
    num_ids, width = ids.shape[1], weight.shape[1]
    num_tails, most_items, num_shared = tails.shape
    out = features.new_empty(len(ids), num_ids + num_shared, dtype=dtype)
    blocks = {"BLOCK_IDS": block_size(num_ids, 32), "BLOCK_WIDTH": block_size(width, 128)}
    blocks["BLOCK_SHARED"] = block_size(num_shared, 1024)
    grid = len(ids), triton.cdiv(num_ids, blocks["BLOCK_IDS"]) + triton.cdiv(num_shared, blocks["BLOCK_SHARED"])
    sizes = num_ids, *weight.shape, features.stride(0), weight.stride(0), ids.stride(0)
    with torch.cuda.device_of(features):
        products_kernel[grid](
            features,
            weight,
            ids,
            out,
            tails.contiguous(),
            *sizes,
            num_shared,
            num_tails,
            most_items,
            WIDE=wide_type(features, weight),
            **blocks,
        )
    return out


@item_products.register_fake
def _(features, weight, ids, tails, dtype):
    return features.new_empty(len(ids), ids.shape[1] + tails.shape[2], dtype=dtype)


@torch.library.custom_op("hf_dis::features_gradient", mutates_args=())
def features_gradient(scales: Tensor, weight: Tensor, ids: Tensor, tails: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Computes Σ_k scale_k W[id_k] of each item, summed in float32 or wider: the products' gradient on the features.

    Args:
        scales: the gradient on each product, ``[N, R]``.
        weight: ``[C, d]``.
        ids: classes of each item, ``[N, R]``; a class outside 0..C-1 gives NaN.
        tails: added to each item, by tail, ``[G, ceil(N / G), d]``; item i is of tail ``i mod G``.
        dtype: of the result.

    Returns:
        ``[N, d]``.
    """
    scales, weight, ids = unit_columns(scales), unit_columns(weight), unit_columns(ids)
    num_ids, width = ids.shape[1], weight.shape[1]
    out = scales.new_empty(len(ids), width, dtype=dtype)
    blocks = {"BLOCK_IDS": block_size(num_ids, 16), "BLOCK_WIDTH": block_size(width, 256)}
    num_tails, most_items = (1, 1) if tails is None else tails.shape[:2]
    sizes = num_ids, *weight.shape, scales.stride(0), weight.stride(0), ids.stride(0), num_tails, most_items
    with torch.cuda.device_of(scales):
        features_gradient_kernel[len(ids), triton.cdiv(width, blocks["BLOCK_WIDTH"])](
            scales,
            weight,
            ids,
            out,
            None if tails is None else tails.contiguous(),
            *sizes,
            WIDE=wide_type(scales, weight),
            HAS_TAILS=tails is not None,
            **blocks,
        )
    return out


@features_gradient.register_fake
def _(scales, weight, ids, tails, dtype):
    return scales.new_empty(len(ids), weight.shape[1], dtype=dtype)


def wide_type(*tensors: Tensor) -> tl.dtype:
    """The type in which a kernel sums."""
    return tl.float64 if sum_dtype(*tensors) == torch.float64 else tl.float32
