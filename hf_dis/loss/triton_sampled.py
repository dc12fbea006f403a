"""Triton kernels: the losses on sampled classes with their gradients, a program per item.

A program reads its item twice: for the normaliser, and for the results. The second time the item is in a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import sum_dtype, unit_columns
from hf_dis.loss.sampled_softmax import times_each
from hf_dis.teacher.triton_normaliser import add_exponentials

# Columns that a program reads at a time.
BLOCK = 1024


@triton.jit
def above_minus_inf(values):
    """Replaces -inf by the lowest number, so that 0 · log 0 is 0 and not NaN."""
    lowest: tl.constexpr = -1.7976931348623157e308 if values.dtype == tl.float64 else -3.4028234663852886e38
    return tl.where(values == float("-inf"), lowest, values)


@triton.jit
def add_logits(peak, total, logit, log_weight):
    """Adds ω exp(logit) of columns to a sum exp(peak) · total."""
    return add_exponentials(peak, total, above_minus_inf(logit) + log_weight)


@triton.jit
def _log_sum(logits, log_weights, width, factor, BLOCK: tl.constexpr):
    """log Σ ω exp(logit · factor) over an item."""
    peak = tl.full((), float("-inf"), factor.dtype)
    total = tl.full((), 0, factor.dtype)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + column, column < width, 0).to(factor.dtype)
        log_weight = tl.load(log_weights + column, column < width, float("-inf")).to(factor.dtype)
        peak, total = add_logits(peak, total, logit * factor, log_weight)
    return peak + tl.log(total)


@triton.jit
def forward_kl_kernel(
    logits,
    log_weights,
    log_probs,
    target,
    loss,
    signal,
    log_student,
    gradient,
    width,
    logits_stride,
    log_weights_stride,
    log_probs_stride,
    target_stride,
    temperature: tl.float64,
    BLOCK: tl.constexpr,
):
    """A program computes the estimated forward KL of an item, its signal, log s, and its gradient."""
    dtype: tl.constexpr = loss.dtype.element_ty
    item = tl.program_id(0).to(tl.int64)
    logits += item * logits_stride
    log_weights += item * log_weights_stride
    log_probs += item * log_probs_stride
    target += item * target_stride
    factor = tl.cast(1 / temperature, dtype)
    tau = tl.cast(temperature, dtype)
    normaliser = _log_sum(logits, log_weights, width, factor, BLOCK)
    divergence = tl.full((), 0, dtype)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        used = column < width
        logit = tl.load(logits + column, used, 0).to(dtype)
        log_weight = tl.load(log_weights + column, used, 0).to(dtype)
        log_prob = tl.load(log_probs + column, used, 0).to(dtype)
        wanted = tl.load(target + column, used, 0).to(dtype)
        log_share = above_minus_inf(logit * factor) - normaliser
        divergence += tl.sum(wanted * (above_minus_inf(log_prob) - log_share), 0)
        slope = (tl.exp(log_share + log_weight) - wanted) * tau
        out = item * width + column
        tl.store(signal + out, tl.exp(log_share) - tl.exp(log_prob), used)
        tl.store(log_student + out, log_share, used)
        tl.store(gradient + out, tl.where(logit == float("-inf"), 0.0, slope), used)
    tl.store(loss + item, divergence * tau * tau)


@triton.jit
def cross_entropy_kernel(
    logits,
    log_weights,
    loss,
    gradient,
    width,
    logits_stride,
    log_weights_stride,
    label,
    BLOCK: tl.constexpr,
):
    """A program computes the estimated cross-entropy of an item, and its gradient."""
    dtype: tl.constexpr = loss.dtype.element_ty
    item = tl.program_id(0).to(tl.int64)
    logits += item * logits_stride
    log_weights += item * log_weights_stride
    normaliser = _log_sum(logits, log_weights, width, tl.full((), 1, dtype), BLOCK)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        used = column < width
        logit = tl.load(logits + column, used, 0).to(dtype)
        log_weight = tl.load(log_weights + column, used, 0).to(dtype)
        slope = tl.exp(logit + log_weight - normaliser) - tl.where(column == label, 1.0, 0.0)
        tl.store(gradient + item * width + column, slope, used)
    tl.store(loss + item, normaliser - tl.load(logits + label).to(dtype))


@triton.jit
def factors(temperature, times, hard_label_weight, dtype: tl.constexpr):
    """The factors 1/τ, (1 - λ) c / τ and λ of a mixture's gradient."""
    soft = tl.cast((1 - hard_label_weight) * times / temperature, dtype)
    return tl.cast(1 / temperature, dtype), soft, tl.cast(hard_label_weight, dtype)


@triton.jit
def mixed_columns(logit, log_weight, log_prob, wanted, is_label, used, normaliser, hard_normaliser, numbers):
    """Computes terms of a mixture at columns of an item.

    Returns:
        the sum of the divergence's terms, the gradient on the logits, log s, the signal, and the number of columns
        whose signal is not finite.
    """
    factor, soft, hard = numbers
    log_share = above_minus_inf(logit * factor) - normaliser
    terms = tl.sum(wanted * (above_minus_inf(log_prob) - log_share), 0)
    slope = (tl.exp(log_share + log_weight) - wanted) * soft
    slope = tl.where(logit == float("-inf"), 0.0, slope)
    slope += hard * (tl.exp(logit + log_weight - hard_normaliser) - tl.where(is_label, 1.0, 0.0))
    error = tl.exp(log_share) - tl.exp(log_prob)
    is_bad = (error != error) | (tl.abs(error) == float("inf"))
    bad = tl.sum((used & (log_weight != float("-inf")) & is_bad).to(tl.int32), 0)
    return terms, slope, log_share, error, bad


@triton.jit
def mixed_kernel(
    logits, log_weights, log_probs, target,
    loss, divergence, cross_entropy, signal, log_student, gradient, finite,
    width, logits_stride, log_weights_stride, log_probs_stride, target_stride, label,
    temperature: tl.float64, times: tl.float64, hard_label_weight: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """The kernels of divergence and cross-entropy in one, with the gradient of their mixture."""
    dtype: tl.constexpr = loss.dtype.element_ty
    item = tl.program_id(0).to(tl.int64)
    logits += item * logits_stride
    log_weights += item * log_weights_stride
    numbers = factors(temperature, times, hard_label_weight, dtype)
    normaliser = _log_sum(logits, log_weights, width, numbers[0], BLOCK)
    hard_normaliser = _log_sum(logits, log_weights, width, tl.full((), 1, dtype), BLOCK)
    sum_of_terms, num_bad = tl.full((), 0, dtype), tl.full((), 0, tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        used = column < width
        logit = tl.load(logits + column, used, 0).to(dtype)
        log_weight = tl.load(log_weights + column, used, 0).to(dtype)
        log_prob = tl.load(log_probs + item * log_probs_stride + column, used, 0).to(dtype)
        wanted = tl.load(target + item * target_stride + column, used, 0).to(dtype)
        terms, slope, log_share, error, bad = mixed_columns(
            logit, log_weight, log_prob, wanted, column == label, used, normaliser, hard_normaliser, numbers
        )
        sum_of_terms += terms
        num_bad += bad
        out = item * width + column
        tl.store(signal + out, error, used)
        tl.store(log_student + out, log_share, used)
        tl.store(gradient + out, slope, used)
    kd = sum_of_terms * tl.cast(times, dtype)
    ce = hard_normaliser - tl.load(logits + label).to(dtype)
    tl.store(divergence + item, kd)
    tl.store(cross_entropy + item, ce)
    tl.store(loss + item, kd * tl.cast(1 - hard_label_weight, dtype) + ce * numbers[2])
    tl.store(finite + item, (num_bad == 0).to(tl.uint8))


@torch.library.custom_op("hf_dis::sampled_forward_kl", mutates_args=())
def forward_kl(
    logits: Tensor, log_weights: Tensor, log_probs: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """τ² KL(p ‖ s) estimated from sampled classes, with its gradient on the logits.

    Args:
        logits, log_weights, log_probs, target: of the sampled classes, ``[N, R]`` each.
        temperature: τ > 0.

    Returns:
        the loss ``[N]``, the signal s - p, log s, and the gradient, ``[N, R]`` each, in float32 or wider.
    """
    given = [unit_columns(tensor) for tensor in (logits, log_weights, log_probs, target)]
    loss, *others = _forward_kl_results(*given)
    with torch.cuda.device_of(logits):
        forward_kl_kernel[(len(logits),)](
            *given, loss, *others, logits.shape[1], *(tensor.stride(0) for tensor in given), temperature, BLOCK=BLOCK
        )
    return loss, *others


@forward_kl.register_fake
def _(logits, log_weights, log_probs, target, temperature):
    return _forward_kl_results(logits, log_weights, log_probs, target)


def _forward_kl_results(logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = sum_dtype(logits, *others)
    loss = logits.new_empty(len(logits), dtype=dtype)
    return loss, *(logits.new_empty(logits.shape, dtype=dtype) for _ in range(3))


@torch.library.custom_op("hf_dis::sampled_cross_entropy", mutates_args=())
def cross_entropy(logits: Tensor, log_weights: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """-log softmax(z)_y estimated from sampled classes, with its gradient on the logits.

    Args:
        logits, log_weights: of the sampled classes, ``[N, R]`` each.
        label: the column of the label.

    Returns:
        the loss ``[N]`` and the gradient ``[N, R]``, in float32 or wider.
    """
    given = [unit_columns(tensor) for tensor in (logits, log_weights)]
    loss, gradient = _cross_entropy_results(logits, log_weights)
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(len(logits),)](
            *given, loss, gradient, logits.shape[1], *(tensor.stride(0) for tensor in given), label, BLOCK=BLOCK
        )
    return loss, gradient


@cross_entropy.register_fake
def _(logits, log_weights, label):
    return _cross_entropy_results(logits, log_weights)


def _cross_entropy_results(logits: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    dtype = sum_dtype(logits, log_weights)
    return logits.new_empty(len(logits), dtype=dtype), logits.new_empty(logits.shape, dtype=dtype)


@torch.library.custom_op("hf_dis::sampled_mixture", mutates_args=())
def mixture(
    logits: Tensor,
    log_weights: Tensor,
    log_probs: Tensor,
    target: Tensor,
    label: int,
    temperature: float,
    times: float,
    hard_label_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(1 - λ) c KL(p ‖ s) + λ CE estimated from sampled classes, with its terms and its gradient on the logits.

    Args:
        logits, log_weights, log_probs, target: of the sampled classes, ``[N, R]`` each.
        label: the column of the label.
        temperature: τ > 0, of the divergence.
        times: c, the factor of the divergence.
        hard_label_weight: λ in [0, 1].

    Returns:
        the loss, c KL and CE, ``[N]`` each; and the signal s - p, log s, and the gradient, ``[N, R]`` each, in float32
        or wider. The last is true for the items whose signal is finite at every column that they use, ``[N]``.
    """
    given = [unit_columns(tensor) for tensor in (logits, log_weights, log_probs, target)]
    *results, finite = _mixture_results(*given)
    strides = (tensor.stride(0) for tensor in given)
    numbers = label, temperature, times, hard_label_weight
    with torch.cuda.device_of(logits):
        mixed_kernel[(len(logits),)](
            *given, *results, finite.view(torch.uint8), logits.shape[1], *strides, *numbers, BLOCK=BLOCK
        )
    return *results, finite


@mixture.register_fake
def _(logits, log_weights, log_probs, target, label, temperature, times, hard_label_weight):
    return _mixture_results(logits, log_weights, log_probs, target)


def _mixture_results(logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, *columns = _forward_kl_results(logits, *others)
    return loss, torch.empty_like(loss), torch.empty_like(loss), *columns, torch.empty_like(loss, dtype=torch.bool)


class SampledMixture(torch.autograd.Function):
    """The loss of :func:`mixture`, differentiable once in the logits, and its other results without gradient."""

    @staticmethod
    def forward(ctx, logits, *others):
        """Returns loss, both terms, signal, log s and the finite items; keeps the gradient for backward."""
        *results, gradient, finite = mixture(logits, *others)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*results[1:], finite)
        return *results, finite

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        """Scales the kept gradient by the gradient on the loss, ``[N]``."""
        (gradient,) = ctx.saved_tensors
        return times_each(grad, gradient, ctx.dtype), *(None,) * 7
