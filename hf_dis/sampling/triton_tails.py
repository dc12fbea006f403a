"""Triton kernels: the density over classes, and the shared tails that are sampled from a density."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size
from hf_dis.sampling.designs import latest_start

# Classes of a program.
BLOCK = 4096


@triton.jit
def class_sums_kernel(squared_signal, marginal, out, num_classes, BLOCK: tl.constexpr):
    """A program sums the signal and the marginal of BLOCK classes."""
    program = tl.program_id(0).to(tl.int64)
    column = program * BLOCK + tl.arange(0, BLOCK)
    signal = tl.sqrt(tl.load(squared_signal + column, column < num_classes, 0))
    tl.store(out + program * 2, tl.sum(signal.to(out.dtype.element_ty), 0))
    mass = tl.load(marginal + column, column < num_classes, 0)
    tl.store(out + program * 2 + 1, tl.sum(mass.to(out.dtype.element_ty), 0))


@triton.jit
def class_density_kernel(
    squared_signal,
    marginal,
    sums,
    out,
    total,
    num_classes,
    num_sums,
    signal_share: tl.float64,
    marginal_share: tl.float64,
    uniform: tl.float64,
    BLOCK: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """A program mixes the density of BLOCK classes; the first also writes the sum over all classes."""
    dtype: tl.constexpr = out.dtype.element_ty
    number = tl.arange(0, BLOCK_SUMS).to(tl.int64)
    of_signal = tl.zeros((BLOCK_SUMS,), dtype)
    of_marginal = tl.zeros((BLOCK_SUMS,), dtype)
    for start in range(0, num_sums, BLOCK_SUMS):
        of_signal += tl.load(sums + (start + number) * 2, start + number < num_sums, 0)
        of_marginal += tl.load(sums + (start + number) * 2 + 1, start + number < num_sums, 0)
    all_signal, all_marginal = tl.sum(of_signal, 0), tl.sum(of_marginal, 0)
    by_signal = tl.cast(signal_share, dtype) / tl.maximum(all_signal, 1e-30)
    by_marginal = tl.cast(marginal_share, dtype) / tl.maximum(all_marginal, 1e-30)
    if tl.program_id(0) == 0:
        tl.store(total, all_signal * by_signal + all_marginal * by_marginal + tl.cast(uniform, dtype) * num_classes)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    signal = tl.sqrt(tl.load(squared_signal + column, column < num_classes, 0)).to(dtype)
    mass = tl.load(marginal + column, column < num_classes, 0).to(dtype)
    mixed = signal * by_signal + mass * by_marginal + tl.cast(uniform, dtype)
    tl.store(out + column, mixed, column < num_classes)


@triton.jit
def tail_scale_kernel(largest, total, out, num_sampled, num_others, tiny: tl.float64, BLOCK: tl.constexpr):
    """The one program finds the factor of capped sampling, and its inverse."""
    number = tl.arange(0, BLOCK)
    used = number < num_sampled
    large = tl.load(largest + number, used, 0)
    rest = (tl.load(total) - tl.sum(large, 0)) / num_others
    rest = tl.maximum(rest, tl.cast(tiny, large.dtype)) * num_others
    others = tl.cumsum(large, 0, reverse=True) + rest
    scale = tl.max(tl.where(used, (num_sampled - number) / others, 0.0), 0)
    tl.store(out, scale)
    tl.store(out + 1, 1 / scale)


@triton.jit
def tail_ids_kernel(
    cumulative,
    density,
    scale,
    ids,
    inclusion,
    num_classes,
    num_sampled,
    num_tails,
    start: tl.float64,
    latest: tl.float64,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program finds the classes at BLOCK points of a tail."""
    tail = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    own = tl.cast(start, tl.float64) + tail.to(tl.float64) / num_tails
    own = tl.minimum(own - tl.floor(own), tl.cast(latest, tl.float64))
    point = (own.to(factor.dtype) + column) / factor
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + num_classes
    for _ in range(STEPS):  # the first class whose sum is above the point lies in low..high
        middle = tl.minimum((low + high) // 2, num_classes - 1)
        is_below = (tl.load(cumulative + middle) <= point) & (low < high)
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_below, high, middle)
    low = tl.minimum(low, num_classes - 1)
    tl.store(ids + tail * num_sampled + column, low, column < num_sampled)
    chance = tl.minimum(factor * tl.load(density + low), 1.0)
    tl.store(inclusion + tail * num_sampled + column, chance, column < num_sampled)


@torch.library.custom_op("hf_dis::class_sums", mutates_args=())
def class_sums(squared_signal: Tensor, marginal: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums the signal and the marginal of each block of classes: ``[blocks, 2]``; see :func:`class_density`."""
    out = _class_sums(squared_signal, dtype)
    with torch.cuda.device_of(marginal):
        class_sums_kernel[(len(out),)](squared_signal, marginal, out, len(marginal), BLOCK=BLOCK)
    return out


@class_sums.register_fake
def _(squared_signal, marginal, dtype):
    return _class_sums(squared_signal, dtype)


def _class_sums(squared_signal: Tensor, dtype: torch.dtype) -> Tensor:
    return squared_signal.new_empty(-(-len(squared_signal) // BLOCK), 2, dtype=dtype)


@torch.library.custom_op("hf_dis::class_density", mutates_args=())
def class_density(
    squared_signal: Tensor, marginal: Tensor, sums: Tensor, shares: list[float]
) -> tuple[Tensor, Tensor]:
    """Mixes a density over classes from two running means, each normalised, and a constant.

    Args:
        squared_signal, marginal: the means, ``[C]``.
        sums: of :func:`class_sums`.
        shares: of the signal, of the marginal, and the constant.

    Returns:
        the density ``[C]``, in the type of the sums, and its sum, a scalar.
    """
    num_classes, num_sums = len(marginal), len(sums)
    out, total = sums.new_empty(num_classes), sums.new_empty(())
    sizes = num_classes, num_sums, *shares
    with torch.cuda.device_of(marginal):
        class_density_kernel[(num_sums,)](
            squared_signal, marginal, sums, out, total, *sizes, BLOCK=BLOCK, BLOCK_SUMS=block_size(num_sums, 1024)
        )
    return out, total


@class_density.register_fake
def _(squared_signal, marginal, sums, shares):
    return sums.new_empty(len(marginal)), sums.new_empty(())


@torch.library.custom_op("hf_dis::tail_scale", mutates_args=())
def tail_scale(largest: Tensor, total: Tensor, num_classes: int) -> Tensor:
    """Finds κ of capped sampling of K_t classes, as :func:`hf_dis.sampling.designs.capping_scale`, and 1/κ.

    Args:
        largest: the K_t highest densities, falling, ``[K_t]``.
        total: the sum of the densities of all classes, a scalar.
        num_classes: C, above K_t.

    Returns:
        ``[2]``.
    """
    out, others = largest.new_empty(2), num_classes - len(largest)
    tiny, block = torch.finfo(largest.dtype).tiny, block_size(len(largest), 2**20)
    with torch.cuda.device_of(largest):
        tail_scale_kernel[(1,)](largest, total, out, len(largest), others, tiny, BLOCK=block)
    return out


@tail_scale.register_fake
def _(largest, total, num_classes):
    return largest.new_empty(2)


@torch.library.custom_op("hf_dis::tail_ids", mutates_args=())
def tail_ids(
    cumulative: Tensor, density: Tensor, scale: Tensor, start: float, num_sampled: int, num_tails: int
) -> tuple[Tensor, Tensor]:
    """Finds the classes of evenly spaced points, and their inclusion probabilities: ``[G, K_t]`` each.

    Args:
        cumulative: running sum of the densities, each at most 1/κ, ``[C]``.
        density: ``[C]``.
        scale: of :func:`tail_scale`.
        start: of the points of the first tail, within [0, 1); the starts of the tails are evenly spaced.
        num_sampled: K_t.
        num_tails: G.
    """
    ids, inclusion = _tail_ids(density, num_sampled, num_tails)
    sizes, steps = (len(density), num_sampled, num_tails), len(density).bit_length() + 1
    with torch.cuda.device_of(density):
        tail_ids_kernel[num_tails, triton.cdiv(num_sampled, 256)](
            cumulative,
            density,
            scale,
            ids,
            inclusion,
            *sizes,
            start,
            latest_start(num_sampled),
            STEPS=steps,
            BLOCK=256,
        )
    return ids, inclusion


@tail_ids.register_fake
def _(cumulative, density, scale, start, num_sampled, num_tails):
    return _tail_ids(density, num_sampled, num_tails)


def _tail_ids(density: Tensor, num_sampled: int, num_tails: int) -> tuple[Tensor, Tensor]:
    inclusion = density.new_empty(num_tails, num_sampled)
    return torch.empty_like(inclusion, dtype=torch.long), inclusion
