"""Triton kernels: logits at an item's sampled classes, the loss, and the gradient on the features, a program per item.

A program reads the rows of W of its item for the logits, and again for the gradient. In between it reads and writes
what the item alone needs, so that the rows are in a cache the second time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.head.triton_products import add_rows, block_products, wide_type
from hf_dis.kernels import block_size, sum_dtype, unit_columns
from hf_dis.loss.triton_sampled import mix_item

# Bytes of the rows of an item, and the warps of its program. The registers of a multiprocessor hold two programs. The
# rows of all items at work are then 42 MiB at most on the 132 multiprocessors of an H100, and 34 MiB on the 108 of an
# A100. The second cache of both holds more.
CACHED_BYTES, WARPS = 160 * 2**10, 16

# Columns of logits that a program reads at a time.
BLOCK = 1024


@triton.jit
def head_kernel(
    features, weight, ids, tails, log_weights, log_probs, target,
    logits, loss, divergence, cross_entropy, signal, gradient, own, finite,
    num_ids, num_classes, width, features_stride, weight_stride, ids_stride, num_shared, num_tails, most_items,
    temperature: tl.float64, times: tl.float64, hard_label_weight: tl.float64,
    WIDE: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes the logits of an item, its loss with the gradient on them, and Σ gradient · row of W."""
    item = tl.program_id(0).to(tl.int64)
    columns = num_ids + num_shared
    row = item * columns
    ids += item * ids_stride
    logits += item * num_ids
    for first in range(0, num_ids, BLOCK_IDS):
        column = first + tl.arange(0, BLOCK_IDS)
        total = block_products(
            features + item * features_stride, weight, ids, column, num_ids, num_classes, width, weight_stride,
            WIDE, BLOCK_IDS, BLOCK_WIDTH,
        )  # fmt: skip
        tl.store(logits + column, total, column < num_ids)
    of_tail = tails + (item % num_tails * most_items + item // num_tails) * num_shared
    tl.debug_barrier()  # other threads of the program wrote the logits
    mix_item(
        logits, of_tail, log_weights + row, log_probs + row, target + row,
        loss, divergence, cross_entropy, signal, None, gradient, finite,
        item, num_ids, columns, num_ids - 1, temperature, times, hard_label_weight, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()  # and the gradient
    for first in range(0, width, BLOCK_WIDTH):
        place = first + tl.arange(0, BLOCK_WIDTH)
        total = add_rows(
            tl.zeros((BLOCK_WIDTH,), WIDE), gradient + row, weight, ids, place, place < width,
            num_ids, num_classes, weight_stride, WIDE, BLOCK_IDS,
        )  # fmt: skip
        tl.store(own + item * width + place, total, place < width)


@triton.jit
def scaled_sum_kernel(
    own, tails, factor, out, width, num_tails, most_items, WIDE: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """A program adds BLOCK_WIDTH columns of an item and of its tail, and scales the sum."""
    item = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    of_tail = item % num_tails * most_items + item // num_tails
    total = tl.load(own + item * width + place, place < width, 0).to(WIDE)
    total += tl.load(tails + of_tail * width + place, place < width, 0).to(WIDE)
    tl.store(out + item * width + place, total * tl.load(factor).to(WIDE), place < width)


@torch.library.custom_op("hf_dis::sampled_head", mutates_args=())
def sampled_head(
    features: Tensor,
    weight: Tensor,
    ids: Tensor,
    tails: Tensor,
    log_weights: Tensor,
    log_probs: Tensor,
    target: Tensor,
    temperature: float,
    times: float,
    hard_label_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes (1 - λ) c KL(p ‖ s) + λ CE from the features, with its gradients.

    Args:
        features: ``[N, d]``, in the type of the logits.
        weight: ``[C, d]``.
        ids: classes of each item, the label last, ``[N, R]``; a class outside 0..C-1 gives NaN.
        tails: products of each tail's items with the tail, ``[G, ceil(N / G), K_t]``; item i is of tail ``i mod G``.
        log_weights, log_probs, target: of the sampled classes, ``[N, R + K_t]`` each.
        temperature: τ > 0, of the divergence.
        times: c, the factor of the divergence.
        hard_label_weight: λ in [0, 1].

    Returns:
        loss: ``[N]``, float32 or wider.
        signal: s - p, ``[N, R + K_t]``, float32 or wider.
        gradient: of the loss on the logits, ``[N, R + K_t]``, in the type of the features.
        own: the gradient on the features that comes from the item's own classes, ``[N, d]``, in the same type.
        finite: true for the items whose signal is finite at every column that they use, ``[N]``.
    """
    features, weight, ids = unit_columns(features), unit_columns(weight), unit_columns(ids)
    given = [tensor.contiguous() for tensor in (tails, log_weights, log_probs, target)]
    loss, signal, gradient, own, finite = _results(features, ids, *given)
    divergence, cross_entropy, logits = torch.empty_like(loss), torch.empty_like(loss), features.new_empty(ids.shape)
    (num_items, num_ids), (num_classes, width) = ids.shape, weight.shape
    num_tails, most_items, num_shared = tails.shape
    strides = features.stride(0), weight.stride(0), ids.stride(0)
    with torch.cuda.device_of(features):
        head_kernel[(num_items,)](
            features, weight, ids, *given,
            logits, loss, divergence, cross_entropy, signal, gradient, own, finite.view(torch.uint8),
            num_ids, num_classes, width, *strides, num_shared, num_tails, most_items,
            temperature, times, hard_label_weight,
            WIDE=wide_type(features, weight), BLOCK_IDS=block_size(num_ids, 32), BLOCK_WIDTH=block_size(width, 128),
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return loss, signal, gradient, own, finite


@sampled_head.register_fake
def _(features, weight, ids, tails, log_weights, log_probs, target, temperature, times, hard_label_weight):
    return _results(features, ids, tails, log_weights, log_probs, target)


def _results(
    features: Tensor, ids: Tensor, tails: Tensor, *sample: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns, dtype = (len(ids), ids.shape[1] + tails.shape[2]), sum_dtype(features, *sample)
    return (
        features.new_empty(len(ids), dtype=dtype),
        features.new_empty(columns, dtype=dtype),
        features.new_empty(columns),
        features.new_empty(features.shape),
        features.new_empty(len(ids), dtype=torch.bool),
    )


@torch.library.custom_op("hf_dis::scaled_sum", mutates_args=())
def scaled_sum(own: Tensor, tails: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds the parts of an item and of its tail, and scales the sum in float32 or wider: ``[N, d]``.

    Args:
        own: the parts of the items, ``[N, d]``.
        tails: the parts of the tails, by tail, ``[G, ceil(N / G), d]``; item i is of tail ``i mod G``.
        factor: a scalar.
        dtype: of the result.
    """
    own, out = own.contiguous(), own.new_empty(own.shape, dtype=dtype)
    width, block = own.shape[1], block_size(own.shape[1], 1024)
    with torch.cuda.device_of(own):
        scaled_sum_kernel[len(own), triton.cdiv(width, block)](
            own, tails.contiguous(), factor, out, width, *tails.shape[:2], WIDE=wide_type(out), BLOCK_WIDTH=block
        )
    return out


@scaled_sum.register_fake
def _(own, tails, factor, dtype):
    return own.new_empty(own.shape, dtype=dtype)
