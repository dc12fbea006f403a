"""Triton kernels: the terms of the loss on all classes and its gradient, which may take the place of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, unit_columns
from hf_dis.loss.divergence import Divergence, ForwardKL
from hf_dis.loss.f_divergence import JensenShannon, ReverseKL, SkewKL
from hf_dis.loss.objective import Answer, Losses, Objective
from hf_dis.loss.triton_exact_sums import log_sum, mean_slopes, part_sums, program_sizes, read, slope_and_terms
from hf_dis.loss.triton_sampled import above_minus_inf
from hf_dis.models.after_head import AfterHead

# Stored classes of an item, which a program compares with each other.
MOST_STORED = 128
# The numbers of the divergences in the kernels.
KINDS = {ForwardKL: 0, ReverseKL: 1, JensenShannon: 2, SkewKL: 3}


@triton.jit
def _hard_slope(value, peak, log_total, ids, label):
    """softmax(z) - onehot(y) at some classes."""
    return tl.exp(value - peak - log_total) - tl.where(ids == label, 1.0, 0.0)


@triton.jit
def _written(soft, hard, value, factor, scale, cap, HAS_CAP: tl.constexpr):
    """The gradient on the logits of the output layer, of an item that counts ``factor`` times."""
    slope = (tl.where(value == float("-inf"), 0.0, soft) + hard) * factor * scale
    if HAS_CAP:
        slope *= 1 - value / cap * (value / cap)
    return slope


@triton.jit
def _all_parts(values, num_parts, BLOCK_PARTS: tl.constexpr):
    """The sum over the parts of an item."""
    part = tl.arange(0, BLOCK_PARTS)
    return tl.sum(tl.load(values + part, part < num_parts, 0), 0)


@triton.jit
def _of_stored(
    logits, ids, log_probs, target, first, last, num_stored, peak, log_total, tau_inverse, scale, cap,
    HAS_CAP: tl.constexpr, BLOCK_STORED: tl.constexpr,
):  # fmt: skip
    """Stored classes of a part: ids, which are here, the student's logits, s - p, and the sum of their terms."""
    place = tl.arange(0, BLOCK_STORED)
    class_id = tl.load(ids + place, place < num_stored, -1)
    is_here = (class_id >= first) & (class_id < last)
    value = read(logits, tl.where(is_here, class_id, last), last, scale, cap, HAS_CAP)
    wanted = tl.load(target + place, place < num_stored, 0).to(value.dtype)
    log_wanted = tl.load(log_probs + place, place < num_stored, 0).to(value.dtype)
    log_share = above_minus_inf(value * tau_inverse - peak - log_total)
    term = tl.sum(tl.where(is_here, wanted * (log_wanted - log_share), 0.0), 0)
    # A class may be stored more than once.
    together = tl.sum(tl.where(class_id[:, None] == class_id[None, :], wanted[None, :], 0.0), 1)
    return class_id, is_here, value, tl.exp(log_share) - together, term


@triton.jit
def terms_kernel(
    logits, teacher, ids, log_probs, target, labels, factors, sums, means, terms, slopes,
    num_classes, num_stored, num_parts, logits_stride, teacher_stride, slopes_stride,
    temperature: tl.float64, scale: tl.float64, cap: tl.float64, weight: tl.float64,
    times: tl.float64, of_soft: tl.float64, of_hard: tl.float64,
    KIND: tl.constexpr, TEACHER: tl.constexpr, HARD: tl.constexpr, HAS_CAP: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_STORED: tl.constexpr,
):  # fmt: skip
    """A program adds up the terms of a part of an item's classes, and writes their gradient."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = sums.dtype.element_ty
    tau_inverse, weight, scale = tl.cast(1 / temperature, dtype), tl.cast(weight, dtype), tl.cast(scale, dtype)
    cap, of_soft, of_hard = tl.cast(cap, dtype), tl.cast(of_soft, dtype), tl.cast(of_hard, dtype)
    logits += item * logits_stride
    last = tl.minimum((part + 1) * PART, num_classes)
    divergence, cross_entropy = tl.full((), 0, dtype), tl.full((), 0, dtype)
    factor = tl.load(factors + item).to(dtype) if factors is not None else tl.full((), 1, dtype)
    mean = _all_parts(means + item * num_parts, num_parts, BLOCK_PARTS) if KIND > 0 else tl.full((), 0, dtype)
    if labels is not None:
        label = tl.load(labels + item)
        hard_peak, hard_total = log_sum(sums, item * 6 + HARD, num_parts, BLOCK_PARTS)
    if TEACHER > 0:
        peak, log_total = log_sum(sums, item * 6, num_parts, BLOCK_PARTS)
    if TEACHER == 1:
        teacher_peak, teacher_total = log_sum(sums, item * 6 + 4, num_parts, BLOCK_PARTS)
    if TEACHER == 2:  # read before the gradient takes the place of the logits
        first = item * num_stored
        class_id, is_here, at_stored, stored_soft, divergence = _of_stored(
            logits, ids + first, log_probs + first, target + first, part * PART, last, num_stored,
            peak, log_total, tau_inverse, scale, cap, HAS_CAP, BLOCK_STORED,
        )  # fmt: skip
        stored_hard = tl.full((BLOCK_STORED,), 0, dtype)
        if labels is not None:
            stored_hard = _hard_slope(at_stored, hard_peak, hard_total, class_id, label) * of_hard
        stored_slope = _written(stored_soft * of_soft, stored_hard, at_stored, factor, scale, cap, HAS_CAP)
        tl.debug_barrier()  # all threads have read
    for start in range(0, PART, BLOCK):
        column = part * PART + start + tl.arange(0, BLOCK)
        value = read(logits, column, last, scale, cap, HAS_CAP)
        soft, hard = tl.full((BLOCK,), 0, dtype), tl.full((BLOCK,), 0, dtype)
        if TEACHER > 0:
            log_student = above_minus_inf(value * tau_inverse - peak - log_total)
            soft = tl.exp(log_student) * of_soft
        if TEACHER == 1:
            logit = tl.load(teacher + item * teacher_stride + column, column < last, float("-inf")).to(dtype)
            log_teacher = above_minus_inf(logit * tau_inverse - teacher_peak - teacher_total)
            slope, term = slope_and_terms(log_student, log_teacher, weight, KIND)
            divergence += tl.sum(term, 0)
            soft = slope * of_soft if KIND == 0 else soft * (slope - mean)
        if labels is not None:
            hard = _hard_slope(value, hard_peak, hard_total, column, label) * of_hard
            cross_entropy += tl.sum(tl.where(column == label, hard_total - (value - hard_peak), 0.0), 0)
        if slopes is not None:
            slope = _written(soft, hard, value, factor, scale, cap, HAS_CAP)
            tl.store(slopes + item * slopes_stride + column, slope, column < last)
    if slopes is not None and TEACHER == 2:
        tl.debug_barrier()  # the loop above wrote the same elements
        tl.store(slopes + item * slopes_stride + class_id, stored_slope, is_here)
    tl.store(terms + item * 2 * num_parts + part, divergence * tl.cast(times, dtype))
    tl.store(terms + (item * 2 + 1) * num_parts + part, cross_entropy)


@torch.library.custom_op("hf_dis::exact_terms", mutates_args=("slopes",))
def exact_terms(
    slopes: Tensor | None,
    logits: Tensor,
    teacher: Tensor | None,
    stored: list[Tensor],
    labels: Tensor | None,
    factors: Tensor | None,
    sums: Tensor,
    means: Tensor | None,
    kind: int,
    numbers: list[float],
) -> Tensor:
    """Adds up the terms of the loss over parts of the classes, and writes the gradient of the loss.

    Args:
        slopes: where the gradient goes, ``[n, C]``, columns side by side; None: nowhere. It may be ``logits``.
        logits, teacher: as for :func:`part_sums`.
        stored: class ids, log-probabilities and target, ``[n, R]`` each, or nothing; then there is no ``teacher``.
        labels: class ids, ``[n]``, or None.
        factors: of the items' gradients, ``[n]``, or None.
        sums: of :func:`part_sums`.
        means: of :func:`mean_slopes`; None for the forward KL.
        kind: of the divergence, a value of ``KINDS``.
        numbers: temperature, scale, soft cap and weight as for :func:`mean_slopes`; factors of the divergence, of its
            gradient and of the gradient of the cross-entropy.

    Returns:
        divergence and cross-entropy of each part, ``[n, 2, P]``, in float32 or wider; zeros without targets or labels.
    """
    logits, teacher = unit_columns(logits), None if teacher is None else unit_columns(teacher)
    source = 1 if teacher is not None else 2 if stored else 0
    stored = [values.contiguous() for values in stored] or [None] * 3
    out, num_stored = _terms(sums), stored[0].shape[1] if source == 2 else 0
    labels, factors = (None if one is None else one.contiguous() for one in (labels, factors))
    given = logits, teacher, *stored, labels, factors, sums, means, out, slopes
    strides = (0 if one is None else one.stride(0) for one in (logits, teacher, slopes))
    chosen = {"KIND": kind, "TEACHER": source, "HARD": 0 if numbers[0] == 1 and source else 2}
    chosen |= {"HAS_CAP": numbers[2] != 0, "BLOCK_STORED": block_size(num_stored, MOST_STORED)}
    sizes = program_sizes(logits.shape[1]) | {"BLOCK_PARTS": block_size(sums.shape[2], 2**20)}
    with torch.cuda.device_of(logits):
        terms_kernel[(len(logits), sums.shape[2])](
            *given, logits.shape[1], num_stored, sums.shape[2], *strides, *numbers, **chosen, **sizes, num_warps=8
        )
    return out


@exact_terms.register_fake
def _(slopes, logits, teacher, stored, labels, factors, sums, *others):
    return _terms(sums)


def _terms(sums: Tensor) -> Tensor:
    return sums.new_empty(len(sums), 2, sums.shape[2])


def has_kernels(answer: Answer, divergence: Divergence) -> bool:
    """Returns True if the kernels compute a divergence for an answer of the teacher."""
    return type(divergence) in KINDS and not (isinstance(answer, tuple) and answer[0].shape[1] > MOST_STORED)


def block_losses(
    logits: Tensor,
    answer: Answer,
    objective: Objective,
    items: slice,
    after_head: AfterHead,
    factors: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Losses:
    """Computes the terms of some items, ``[n]``, and the gradient of their mixture on the logits.

    Args:
        logits: of the student's output layer, ``[n, C]``, any floating-point type.
        answer: of the teacher about these items; None: cross-entropy alone.
        objective: the loss of all items, which :func:`has_kernels`.
        items: which of all items these are.
        after_head: the operations after the output layer; its own bias is None.
        factors: of all items' gradients, ``[N]``; None: one.
        slopes: where the gradient goes, ``[n, C]``, columns side by side; None: nowhere. It may be ``logits``.
    """
    labels = None if objective.labels is None else objective.labels[items]
    is_stored, divergence, temperature = isinstance(answer, tuple), objective.divergence, objective.temperature
    teacher = None if is_stored else answer
    given = temperature, float(after_head.scale), float(after_head.soft_cap or 0)
    has_divergence = answer is not None
    sums = part_sums(
        logits, teacher, *given, has_divergence, labels is not None and not (has_divergence and temperature == 1)
    )
    kind, weight = (KINDS[type(divergence)] if isinstance(answer, Tensor) else 0), _weight(divergence)
    means = mean_slopes(logits, teacher, sums, *given, kind, weight) if kind else None
    times = (temperature**2 if divergence.scale_by_temperature else 1.0) if has_divergence else 0.0
    hard = objective.hard_label_weight if has_divergence else 1.0
    numbers = [*given, weight, times, times / temperature * (1 - hard if labels is not None else 1.0), hard]
    stored = list(answer) if is_stored else []
    own_factors = None if factors is None else factors[items]
    terms = exact_terms(slopes, logits, teacher, stored, labels, own_factors, sums, means, kind, numbers)
    kd, ce = (terms.sum(2) if terms.shape[2] > 1 else terms[:, :, 0]).unbind(1)
    found = {"kd_loss": kd} if has_divergence else {}
    return found if labels is None else found | {"ce_loss": ce}


def _weight(divergence: Divergence) -> float:
    """The teacher's weight in the mixture that a divergence compares with."""
    if isinstance(divergence, JensenShannon):
        return divergence.beta
    return divergence.alpha if isinstance(divergence, SkewKL) else 0.5
