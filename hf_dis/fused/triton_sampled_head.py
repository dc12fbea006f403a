"""Triton kernels: logits at an item's sampled classes, the loss, and the gradient on the features, a program per item.

A program reads the rows of W of its item for the logits, and again for the gradient. In between it reads and writes
what the item alone needs, so that the rows are in a cache the second time. The columns of its tail are computed where
they are used, and are not held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.head.triton_products import add_rows, block_products, wide_type
from hf_dis.kernels import block_size, sum_dtype, unit_columns
from hf_dis.loss.triton_sampled import add_logits, factors, mixed_columns
from hf_dis.sampling.triton_assembly import add_target, all_mass, share_of_tail, tail_columns

# Bytes of the rows of an item, and the warps of its program. The registers of a multiprocessor hold two programs. The
# rows of all items at work are then 42 MiB at most on the 132 multiprocessors of an H100, and 34 MiB on the 108 of an
# A100. The second cache of both holds more.
CACHED_BYTES, WARPS = 160 * 2**10, 16

# Columns of logits that a program reads at a time.
BLOCK = 1024


@triton.jit
def _own_columns(logits, log_weights, log_probs, target, column, num_own, dtype: tl.constexpr):
    """Reads columns of an item's own classes."""
    used = column < num_own
    return (
        tl.load(logits + column, used, 0).to(dtype),
        tl.load(log_weights + column, used, float("-inf")).to(dtype),
        tl.load(log_probs + column, used, 0).to(dtype),
        tl.load(target + column, used, 0).to(dtype),
    )


@triton.jit
def _tail_columns(logits, tail, column, dtype: tl.constexpr):
    """Computes columns of an item's tail: logits, log ω, log p, and true where certain."""
    ids, tail_ids, inclusion, log_probs, num_shared, depth, label = tail
    logit = tl.load(logits + column, column < num_shared, 0).to(dtype)
    _, log_prob, log_weight, is_certain = tail_columns(
        ids, tail_ids, inclusion, log_probs, column, num_shared, depth, label, True
    )
    return logit, log_weight.to(dtype), log_prob.to(dtype), is_certain


@triton.jit
def _sums(own, num_own, tail_logits, tail, tail_mass, factor, BLOCK_OWN: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over all columns of an item.

    Returns:
        log Σ ω exp(logit / τ), log Σ ω exp(logit), the sum of all targets, and what share_of_tail takes.
    """
    dtype: tl.constexpr = factor.dtype
    logits, log_weights, log_probs, target = own
    no_peak, zero = tl.full((), float("-inf"), dtype), tl.full((), 0, dtype)
    peak, total, hard_peak, hard_total, own_mass = no_peak, zero, no_peak, zero, zero
    for start in range(0, num_own, BLOCK_OWN):
        column = start + tl.arange(0, BLOCK_OWN)
        logit, log_weight, _, wanted = _own_columns(logits, log_weights, log_probs, target, column, num_own, dtype)
        peak, total = add_logits(peak, total, logit * factor, log_weight)
        hard_peak, hard_total = add_logits(hard_peak, hard_total, logit, log_weight)
        own_mass += tl.sum(wanted, 0)
    tail_peak, tail_total, exact = no_peak, zero, zero
    for start in range(0, tail[4], BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit, log_weight, log_prob, is_certain = _tail_columns(tail_logits, tail, column, dtype)
        peak, total = add_logits(peak, total, logit * factor, log_weight)
        hard_peak, hard_total = add_logits(hard_peak, hard_total, logit, log_weight)
        tail_peak, tail_total, exact = add_target(tail_peak, tail_total, exact, log_prob, log_weight, is_certain)
    rest = tl.maximum(tail_mass - exact, 0)
    total_target = all_mass(own_mass, exact, tail_total, rest)
    return peak + tl.log(total), hard_peak + tl.log(hard_total), total_target, tail_peak, tail_total, rest


@triton.jit
def _mix_item(
    own, num_own, tail_logits, tail, tail_mass, signal, gradient, tail_gradient,
    temperature, times, hard_label_weight, dtype: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes the loss of an item, and stores its signal and its gradient on the logits.

    Returns:
        the loss, and the number of columns whose signal is not finite.
    """
    logits, log_weights, log_probs, target = own
    num_shared = tail[4]
    numbers = factors(temperature, times, hard_label_weight, dtype)
    normaliser, hard_normaliser, total_target, peak, total, rest = _sums(
        own, num_own, tail_logits, tail, tail_mass, numbers[0], BLOCK_OWN, BLOCK
    )
    kd, num_bad = tl.full((), 0, dtype), tl.full((), 0, tl.int32)
    for start in range(0, num_own, BLOCK_OWN):
        column = start + tl.arange(0, BLOCK_OWN)
        used, is_label = column < num_own, column == num_own - 1
        logit, log_weight, log_prob, wanted = _own_columns(
            logits, log_weights, log_probs, target, column, num_own, dtype
        )
        terms, slope, _, error, bad = mixed_columns(
            logit, log_weight, log_prob, wanted / total_target, is_label, used, normaliser, hard_normaliser, numbers
        )
        kd += terms
        num_bad += bad
        tl.store(signal + column, error, used)
        tl.store(gradient + column, slope, used)
    for start in range(0, num_shared, BLOCK):
        column = start + tl.arange(0, BLOCK)
        used, is_label = column < num_shared, column < 0
        logit, log_weight, log_prob, is_certain = _tail_columns(tail_logits, tail, column, dtype)
        wanted = share_of_tail(log_prob, log_weight, is_certain, peak, total, rest)
        terms, slope, _, error, bad = mixed_columns(
            logit, log_weight, log_prob, wanted / total_target, is_label, used, normaliser, hard_normaliser, numbers
        )
        kd += terms
        num_bad += bad
        tl.store(signal + num_own + column, error, used)
        tl.store(tail_gradient + column, slope, used)
    ce = hard_normaliser - tl.load(logits + num_own - 1).to(dtype)
    return kd * tl.cast((1 - hard_label_weight) * times, dtype) + ce * numbers[2], num_bad


@triton.jit
def head_kernel(
    features, weight, ids, log_weights, log_probs, target, tails, tail_ids, inclusion, tail_log_probs, tail_mass, held,
    logits, loss, signal, gradient, tail_gradient, own, finite,
    num_own, num_classes, width, num_shared, num_tails, most_items, num_held,
    features_stride, weight_stride, ids_stride, held_stride, tail_stride,
    temperature: tl.float64, times: tl.float64, hard_label_weight: tl.float64,
    WIDE: tl.constexpr, BLOCK_IDS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes the logits of an item, its loss with the gradient on them, and Σ gradient · row of W."""
    dtype: tl.constexpr = loss.dtype.element_ty
    item = tl.program_id(0).to(tl.int64)
    of_item, of_tail = item * num_own, item % num_tails * num_shared
    ids += item * ids_stride
    logits += of_item
    for first in range(0, num_own, BLOCK_IDS):
        column = first + tl.arange(0, BLOCK_IDS)
        products = block_products(
            features + item * features_stride, weight, ids, column, num_own, num_classes, width, weight_stride,
            WIDE, BLOCK_IDS, BLOCK_WIDTH,
        )  # fmt: skip
        tl.store(logits + column, products, column < num_own)
    tl.debug_barrier()  # other threads of the program wrote the logits
    tail = (
        held + item * held_stride, tail_ids + of_tail, inclusion + of_tail, tail_log_probs + item * tail_stride,
        num_shared, num_held, tl.load(ids + num_own - 1),
    )  # fmt: skip
    tails += (item % num_tails * most_items + item // num_tails) * num_shared
    value, num_bad = _mix_item(
        (logits, log_weights + of_item, log_probs + of_item, target + of_item), num_own, tails, tail,
        tl.load(tail_mass + item), signal + item * (num_own + num_shared), gradient + of_item,
        tail_gradient + item * num_shared,
        temperature, times, hard_label_weight, dtype, BLOCK_OWN, BLOCK,
    )  # fmt: skip
    tl.store(loss + item, value)
    tl.store(finite + item, (num_bad == 0).to(tl.uint8))
    tl.debug_barrier()  # and the gradient
    for first in range(0, width, BLOCK_WIDTH):
        place = first + tl.arange(0, BLOCK_WIDTH)
        total = add_rows(
            tl.zeros((BLOCK_WIDTH,), WIDE), gradient + of_item, weight, ids, place, place < width,
            num_own, num_classes, weight_stride, WIDE, BLOCK_IDS,
        )  # fmt: skip
        tl.store(own + item * width + place, total, place < width)


@torch.library.custom_op("hf_dis::sampled_head", mutates_args=())
def sampled_head(
    features: Tensor,
    weight: Tensor,
    ids: Tensor,
    of_items: list[Tensor],
    tails: Tensor,
    of_tails: list[Tensor],
    held_ids: Tensor,
    temperature: float,
    times: float,
    hard_label_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes (1 - λ) c KL(p ‖ s) + λ CE from the features, with its gradients.

    Args:
        features: ``[N, d]``, in the type of the logits.
        weight: ``[C, d]``.
        ids: classes of each item, the label last, ``[N, R]``; a class outside 0..C-1 gives NaN.
        of_items: ``log_weights``, ``log_probs`` and ``target`` of these classes, as
            :class:`hf_dis.sampling.by_kernels.SampleWithoutTails` has them, ``[N, R]`` each.
        tails: products of each tail's items with the tail, ``[G, ceil(N / G), K_t]``; item i is of tail ``i mod G``.
        of_tails: ``tail_ids``, ``inclusion``, ``tail_log_probs`` and ``tail_mass`` of that sample.
        held_ids: of that sample, ``[N, m]``.
        temperature: τ > 0, of the divergence.
        times: c, the factor of the divergence.
        hard_label_weight: λ in [0, 1].

    Returns:
        loss: ``[N]``, float32 or wider.
        signal: s - p, ``[N, R + K_t]``, float32 or wider.
        gradients: of the loss on the logits of own classes, ``[N, R]``, and of the tail, ``[N, K_t]``, in the type of
            the features.
        own: the gradient on the features that comes from the item's own classes, ``[N, d]``, in the same type.
        finite: true for the items whose signal is finite at every column that they use, ``[N]``.
    """
    features, weight, ids, held_ids = (unit_columns(one) for one in (features, weight, ids, held_ids))
    tail_ids, inclusion, tail_log_probs, tail_mass = of_tails
    tail_log_probs, logits = unit_columns(tail_log_probs), features.new_empty(ids.shape)
    shared = tail_ids.contiguous(), inclusion.contiguous(), tail_log_probs, tail_mass.contiguous(), held_ids
    results = _results(features, ids, of_items, tails)
    *numbers, finite = results
    num_tails, most_items, num_shared = tails.shape
    sizes = ids.shape[1], *weight.shape, num_shared, num_tails, most_items, held_ids.shape[1]
    strides = (one.stride(0) for one in (features, weight, ids, held_ids, tail_log_probs))
    blocks = {"BLOCK_IDS": block_size(ids.shape[1], 32), "BLOCK_WIDTH": block_size(weight.shape[1], 128)}
    with torch.cuda.device_of(features):
        head_kernel[(len(ids),)](
            features, weight, ids, *(one.contiguous() for one in of_items), tails.contiguous(), *shared,
            logits, *numbers, finite.view(torch.uint8), *sizes, *strides, temperature, times, hard_label_weight,
            WIDE=wide_type(features, weight), BLOCK_OWN=block_size(ids.shape[1], BLOCK), BLOCK=BLOCK, **blocks,
            num_warps=WARPS,
        )  # fmt: skip
    return results


@sampled_head.register_fake
def _(features, weight, ids, of_items, tails, of_tails, held_ids, temperature, times, hard_label_weight):
    return _results(features, ids, of_items, tails)


def _results(
    features: Tensor, ids: Tensor, of_items: list[Tensor], tails: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = (len(ids), ids.shape[1] + tails.shape[2]), sum_dtype(features, *of_items)
    return (
        features.new_empty(len(ids), dtype=dtype),
        features.new_empty(shape, dtype=dtype),
        features.new_empty(ids.shape),
        features.new_empty(len(ids), tails.shape[2]),
        features.new_empty(features.shape),
        features.new_empty(len(ids), dtype=torch.bool),
    )
