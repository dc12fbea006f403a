"""Triton kernels: the normaliser of a teacher's logits and the mass of each class, read in the logits' own type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, sum_dtype, unit_columns

# Logits of an item that a program reads at a time.
BLOCK = 8192


@triton.jit
def add_exponentials(peak, total, values):
    """Adds the exponentials of values to a sum exp(peak) · total, and moves the peak to the highest value."""
    higher = tl.maximum(peak, tl.max(values, 0))
    # Where all values are -inf so far, -inf - -inf would be NaN.
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(peak - finite) + tl.sum(tl.exp(values - finite), 0)


@triton.jit
def log_normaliser_kernel(
    logits,
    out,
    maxima,
    num_classes,
    num_grouped,
    stride,
    temperature: tl.float64,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program reads the logits of an item once, with a running maximum, and writes the maximum of each group."""
    item = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    factor = tl.cast(1 / temperature, dtype)
    peak = tl.full((), float("-inf"), dtype)
    total = tl.full((), 0, dtype)
    num_groups = num_grouped // GROUP
    logits += item * stride
    maxima += item * num_groups
    member = tl.arange(0, GROUP).to(tl.int64) * num_groups
    for start in range(0, num_groups, BLOCK // GROUP):
        group = start + tl.arange(0, BLOCK // GROUP)
        inside = (group < num_groups)[None, :] & (member >= 0)[:, None]
        logit = tl.load(logits + member[:, None] + group[None, :], inside, float("-inf"))
        tl.store(maxima + group, tl.max(logit, 0), group < num_groups)
        peak, total = add_exponentials(peak, total, tl.reshape(logit, (BLOCK,)).to(dtype) * factor)
    for start in range(num_grouped, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + column, column < num_classes, float("-inf"))
        peak, total = add_exponentials(peak, total, logit.to(dtype) * factor)
    tl.store(out + item, peak + tl.log(total))


@triton.jit
def class_mass_kernel(
    logits,
    log_normaliser,
    added,
    out,
    num_items,
    num_classes,
    stride,
    normaliser_stride,
    temperature: tl.float64,
    times: tl.float64,
    HAS_ADDED: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """A program sums the probabilities of BLOCK_CLASSES classes over all items."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    factor = tl.cast(1 / temperature, out.dtype.element_ty)
    total = tl.zeros((BLOCK_CLASSES,), out.dtype.element_ty)
    for start in range(0, num_items, BLOCK_ITEMS):
        item = start + tl.arange(0, BLOCK_ITEMS).to(tl.int64)
        inside = (item < num_items)[:, None] & (column < num_classes)[None, :]
        logit = tl.load(logits + (item * stride)[:, None] + column[None, :], inside, float("-inf"))
        normaliser = tl.load(log_normaliser + item * normaliser_stride, item < num_items, 0.0)
        scaled = logit.to(out.dtype.element_ty) * factor
        total += tl.sum(tl.exp(scaled - normaliser.to(out.dtype.element_ty)[:, None]), 0)
    total *= tl.cast(times, out.dtype.element_ty)
    if HAS_ADDED:
        total += tl.load(added + column, column < num_classes, 0)
    tl.store(out + column, total, column < num_classes)


@triton.jit
def take_ranked_kernel(
    mass, ids, log_probs, first, every, depth, ids_stride, log_probs_stride, times: tl.float64, BLOCK: tl.constexpr
):
    """A program takes the probabilities of an item's ranked classes out of the mass."""
    item = first + tl.program_id(0).to(tl.int64) * every
    for start in range(0, depth, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        row = tl.load(ids + item * ids_stride + rank, rank < depth, 0)
        prob = tl.exp(tl.load(log_probs + item * log_probs_stride + rank, rank < depth, float("-inf")))
        tl.atomic_add(mass + row, -(prob * tl.cast(times, prob.dtype)).to(mass.dtype.element_ty), rank < depth)


@torch.library.custom_op("hf_dis::log_normaliser", mutates_args=())
def log_normaliser(logits: Tensor, temperature: float, num_groups: int = 0, group: int = 1) -> tuple[Tensor, Tensor]:
    """Computes log Σ exp(logit / τ) of each item, and the highest logit of groups of classes.

    Class c is in group c mod G; the classes from G times the group size on are in none.

    Args:
        logits: of the teacher, ``[n, C]``, any floating-point type; -inf for masked classes.
        temperature: τ > 0.
        num_groups: G.
        group: the classes of a group, a power of two.

    Returns:
        ``[n, 1]``, float32; float64 for float64 logits. NaN where a logit is NaN or inf, -inf where all are masked.
        The maxima, ``[n, G]``, in the type of the logits.
    """
    logits = unit_columns(logits)
    out, maxima = _normaliser_results(logits, num_groups)
    with torch.cuda.device_of(logits):
        log_normaliser_kernel[(len(logits),)](
            logits,
            out,
            maxima,
            logits.shape[1],
            group * num_groups,
            logits.stride(0),
            temperature,
            GROUP=group,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return out, maxima


@log_normaliser.register_fake
def _(logits, temperature, num_groups=0, group=1):
    return _normaliser_results(logits, num_groups)


def _normaliser_results(logits: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), 1, dtype=sum_dtype(logits)), logits.new_empty(len(logits), num_groups)


@torch.library.custom_op("hf_dis::class_mass", mutates_args=())
def class_mass(
    logits: Tensor, log_normaliser: Tensor, temperature: float, times: float, added: Tensor | None = None
) -> Tensor:
    """Sums the teacher's probability of each class over items, times a number.

    Args:
        logits: of the teacher, ``[n, C]``, any floating-point type; -inf for masked classes.
        log_normaliser: log Σ exp(logit / τ), ``[n, 1]``.
        temperature: τ > 0.
        times: the factor.
        added: a mass that is added, ``[C]``.

    Returns:
        ``[C]``, float32; float64 for float64 logits.
    """
    logits = unit_columns(logits)
    num_items, num_classes = logits.shape
    out = logits.new_empty(num_classes, dtype=sum_dtype(logits))
    with torch.cuda.device_of(logits):
        class_mass_kernel[(triton.cdiv(num_classes, 256),)](
            logits,
            log_normaliser,
            added,
            out,
            num_items,
            num_classes,
            logits.stride(0),
            log_normaliser.stride(0),
            temperature,
            times,
            HAS_ADDED=added is not None,
            BLOCK_ITEMS=16,
            BLOCK_CLASSES=256,
        )
    return out


@class_mass.register_fake
def _(logits, log_normaliser, temperature, times, added=None):
    return logits.new_empty(logits.shape[1], dtype=sum_dtype(logits))


@torch.library.custom_op("hf_dis::take_ranked", mutates_args=("mass",))
def take_ranked(mass: Tensor, ids: Tensor, log_probs: Tensor, first: int, stop: int, every: int, times: float) -> None:
    """Takes the probabilities of ranked classes, times a number, out of a mass over classes.

    Several items may rank a class: as ``index_add_`` of torch, the kernel adds in any order.

    Args:
        mass: ``[C]``.
        ids: classes, ``[N, m]``.
        log_probs: of these classes, ``[N, m]``.
        first, stop, every: the items that count, as in a slice.
        times: the factor.
    """
    ids, log_probs = unit_columns(ids), unit_columns(log_probs)
    sizes = first, every, ids.shape[1], ids.stride(0), log_probs.stride(0), times
    with torch.cuda.device_of(mass):
        take_ranked_kernel[(len(range(first, stop, every)),)](
            mass, ids, log_probs, *sizes, BLOCK=block_size(ids.shape[1], 1024)
        )


@take_ranked.register_fake
def _(mass, ids, log_probs, first, stop, every, times):
    return None
