"""Triton kernels: products of features with sampled rows of W, and their gradient on the features.

The gathered rows ``[N, R, d]`` are never held: a program reads each row straight into its sum.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, sum_dtype, unit_columns


@triton.jit
def products_kernel(
    features,
    weight,
    ids,
    out,
    num_ids,
    num_classes,
    width,
    features_stride,
    weight_stride,
    ids_stride,
    BLOCK_IDS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A program computes BLOCK_IDS products of an item."""
    item = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_IDS + tl.arange(0, BLOCK_IDS)
    row = tl.load(ids + item * ids_stride + column, column < num_ids, -1).to(tl.int64)
    is_class = (row >= 0) & (row < num_classes)
    total = tl.zeros((BLOCK_IDS,), out.dtype.element_ty)
    for start in range(0, width, BLOCK_WIDTH):
        place = start + tl.arange(0, BLOCK_WIDTH)
        inside = place < width
        feature = tl.load(features + item * features_stride + place, inside, 0).to(out.dtype.element_ty)
        places = weight + (row * weight_stride)[:, None] + place[None, :]
        vectors = tl.load(places, is_class[:, None] & inside[None, :], 0).to(out.dtype.element_ty)
        total += tl.sum(vectors * feature[None, :], 1)
    total = tl.where(is_class, total, float("nan"))
    tl.store(out + item * num_ids + column, total, column < num_ids)


@triton.jit
def features_gradient_kernel(
    scales,
    weight,
    ids,
    out,
    num_ids,
    num_classes,
    width,
    scales_stride,
    weight_stride,
    ids_stride,
    BLOCK_IDS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A program sums BLOCK_WIDTH columns of the scaled rows of an item."""
    item = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = place < width
    total = tl.zeros((BLOCK_WIDTH,), out.dtype.element_ty)
    for start in range(0, num_ids, BLOCK_IDS):
        column = start + tl.arange(0, BLOCK_IDS)
        row = tl.load(ids + item * ids_stride + column, column < num_ids, -1).to(tl.int64)
        is_class = (row >= 0) & (row < num_classes)
        scale = tl.load(scales + item * scales_stride + column, column < num_ids, 0).to(out.dtype.element_ty)
        scale = tl.where(is_class | (column >= num_ids), scale, float("nan"))
        places = weight + (row * weight_stride)[:, None] + place[None, :]
        vectors = tl.load(places, is_class[:, None] & inside[None, :], 0).to(out.dtype.element_ty)
        total += tl.sum(vectors * scale[:, None], 0)
    tl.store(out + item * width + place, total, inside)


@torch.library.custom_op("hf_dis::item_products", mutates_args=())
def item_products(features: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Computes ``h wᵀ`` of each item with its sampled rows of W, summed in float32 or wider.

    Args:
        features: ``[N, d]``.
        weight: ``[C, d]``.
        ids: classes of each item, ``[N, R]``; a class outside 0..C-1 gives NaN.

    Returns:
        ``[N, R]``, float32; float64 where an argument is float64.
    """
    num_ids, width = ids.shape[1], weight.shape[1]
    blocks = {"BLOCK_IDS": block_size(num_ids, 32), "BLOCK_WIDTH": block_size(width, 128)}
    return _launched(products_kernel, features, weight, ids, num_ids, blocks["BLOCK_IDS"], blocks)


@item_products.register_fake
def _(features, weight, ids):
    return features.new_empty(ids.shape, dtype=sum_dtype(features, weight))


@torch.library.custom_op("hf_dis::features_gradient", mutates_args=())
def features_gradient(scales: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Computes Σ_k scale_k W[id_k] of each item, summed in float32 or wider: the products' gradient on the features.

    Args:
        scales: the gradient on each product, ``[N, R]``.
        weight: ``[C, d]``.
        ids: classes of each item, ``[N, R]``; a class outside 0..C-1 gives NaN.

    Returns:
        ``[N, d]``, float32; float64 where an argument is float64.
    """
    num_ids, width = ids.shape[1], weight.shape[1]
    blocks = {"BLOCK_IDS": block_size(num_ids, 16), "BLOCK_WIDTH": block_size(width, 256)}
    return _launched(features_gradient_kernel, scales, weight, ids, width, blocks["BLOCK_WIDTH"], blocks)


@features_gradient.register_fake
def _(scales, weight, ids):
    return scales.new_empty(len(ids), weight.shape[1], dtype=sum_dtype(scales, weight))


def _launched(
    kernel: Any, of_items: Tensor, weight: Tensor, ids: Tensor, num_columns: int, block: int, blocks: dict[str, int]
) -> Tensor:
    """Runs a kernel by a program per item and per block of the result's columns.

    Args:
        kernel: one of those above.
        of_items: its first argument, with a row per item.
        weight, ids: its next arguments.
        num_columns: of the result.
        block: columns of the result per program.
        blocks: the sizes of the kernel's blocks.

    Returns:
        ``[N, num_columns]``.
    """
    given = [unit_columns(tensor) for tensor in (of_items, weight, ids)]
    strides = [tensor.stride(0) for tensor in given]
    out = of_items.new_empty(len(ids), num_columns, dtype=sum_dtype(of_items, weight))
    with torch.cuda.device_of(of_items):
        kernel[len(ids), triton.cdiv(num_columns, block)](*given, out, ids.shape[1], *weight.shape, *strides, **blocks)
    return out
