"""Triton kernels: sums over all classes that a loss and its gradient need, of student and teacher, part by part."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, sum_dtype, unit_columns
from hf_dis.loss.triton_sampled import above_minus_inf
from hf_dis.teacher.triton_normaliser import add_exponentials

# Classes of a program, and classes that it reads at a time: the items of a block are too few to keep a device busy.
PART, BLOCK = 2**15, 4096


@triton.jit
def read(logits, column, last, scale, cap, HAS_CAP: tl.constexpr):
    """Reads logits and applies scale and soft cap; -inf beyond the last class."""
    value = tl.load(logits + column, column < last, float("-inf")).to(scale.dtype) * scale
    if HAS_CAP:
        value = cap - 2 * cap / (1 + tl.exp(2 * value / cap))  # cap · tanh(value / cap)
    return tl.where(column < last, value, float("-inf"))


@triton.jit
def part_sums_kernel(
    logits, teacher, sums, num_classes, num_parts, logits_stride, teacher_stride,
    temperature: tl.float64, scale: tl.float64, cap: tl.float64,
    TEACHER: tl.constexpr, HAS_LABEL: tl.constexpr, HAS_CAP: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program sums the exponentials of a part of an item's classes: of both models at τ, of the student at 1."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = sums.dtype.element_ty
    factor = tl.cast(1 / temperature, dtype)
    scale, cap = tl.cast(scale, dtype), tl.cast(cap, dtype)
    logits += item * logits_stride
    last = tl.minimum((part + 1) * PART, num_classes)
    peak, hard_peak = tl.full((), float("-inf"), dtype), tl.full((), float("-inf"), dtype)
    teacher_peak = tl.full((), float("-inf"), dtype)
    total, hard_total, teacher_total = tl.full((), 0, dtype), tl.full((), 0, dtype), tl.full((), 0, dtype)
    for start in range(0, PART, BLOCK):
        column = part * PART + start + tl.arange(0, BLOCK)
        value = read(logits, column, last, scale, cap, HAS_CAP)
        if HAS_LABEL:
            hard_peak, hard_total = add_exponentials(hard_peak, hard_total, value)
        if TEACHER > 0:
            peak, total = add_exponentials(peak, total, value * factor)
        if TEACHER == 1:
            logit = tl.load(teacher + item * teacher_stride + column, column < last, float("-inf")).to(dtype)
            teacher_peak, teacher_total = add_exponentials(teacher_peak, teacher_total, logit * factor)
    first = item * 6
    tl.store(sums + first * num_parts + part, peak)
    tl.store(sums + (first + 1) * num_parts + part, total)
    tl.store(sums + (first + 2) * num_parts + part, hard_peak)
    tl.store(sums + (first + 3) * num_parts + part, hard_total)
    tl.store(sums + (first + 4) * num_parts + part, teacher_peak)
    tl.store(sums + (first + 5) * num_parts + part, teacher_total)


@triton.jit
def log_sum(sums, row, num_parts, BLOCK_PARTS: tl.constexpr):
    """The maximum of an item, and the logarithm of the sum beyond it, from a row of maxima and one of sums."""
    part = tl.arange(0, BLOCK_PARTS)
    peaks = tl.load(sums + row * num_parts + part, part < num_parts, float("-inf"))
    totals = tl.load(sums + (row + 1) * num_parts + part, part < num_parts, 0)
    peak = tl.max(peaks, 0)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    return peak, tl.log(tl.sum(tl.exp(peaks - finite) * totals, 0))


@triton.jit
def slope_and_terms(log_student, log_teacher, weight, KIND: tl.constexpr):
    """ψ and the terms of :class:`hf_dis.loss.f_divergence.FDivergence`; of the forward KL s - p and the terms."""
    student, teacher = tl.exp(log_student), tl.exp(log_teacher)
    if KIND == 0:  # the forward KL
        return student - teacher, (log_teacher - log_student) * teacher
    if KIND == 1:  # the reverse KL
        slope = log_student - log_teacher
        return slope, student * slope - student + teacher
    # m = weight p + (1 - weight) s
    of_teacher, of_student = log_teacher + tl.log(weight), log_student + tl.log(1 - weight)
    higher = tl.maximum(of_teacher, of_student, propagate_nan=tl.PropagateNan.ALL)
    log_mixture = higher + tl.log(1 + tl.exp(tl.minimum(of_teacher, of_student) - higher))
    if KIND == 2:  # Jensen-Shannon
        slope = (log_student - log_mixture) * (1 - weight)
        return slope, student * slope + weight * teacher * (log_teacher - log_mixture)
    log_ratio = log_teacher - log_mixture  # skew KL
    terms = teacher * log_ratio + (1 - weight) * (student - teacher)
    return tl.exp(log_ratio) * (weight - 1), terms


@triton.jit
def mean_slopes_kernel(
    logits, teacher, sums, means, num_classes, num_parts, logits_stride, teacher_stride,
    temperature: tl.float64, scale: tl.float64, cap: tl.float64, weight: tl.float64,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """A program sums s ψ over a part of an item's classes."""
    item, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = sums.dtype.element_ty
    factor, weight = tl.cast(1 / temperature, dtype), tl.cast(weight, dtype)
    scale, cap = tl.cast(scale, dtype), tl.cast(cap, dtype)
    logits += item * logits_stride
    peak, log_total = log_sum(sums, item * 6, num_parts, BLOCK_PARTS)
    teacher_peak, teacher_total = log_sum(sums, item * 6 + 4, num_parts, BLOCK_PARTS)
    last = tl.minimum((part + 1) * PART, num_classes)
    total = tl.full((), 0, dtype)
    for start in range(0, PART, BLOCK):
        column = part * PART + start + tl.arange(0, BLOCK)
        value = read(logits, column, last, scale, cap, HAS_CAP)
        logit = tl.load(teacher + item * teacher_stride + column, column < last, float("-inf")).to(dtype)
        log_student = above_minus_inf(value * factor - peak - log_total)
        log_teacher = above_minus_inf(logit * factor - teacher_peak - teacher_total)
        slope, _ = slope_and_terms(log_student, log_teacher, weight, KIND)
        total += tl.sum(tl.exp(log_student) * slope, 0)
    tl.store(means + item * num_parts + part, total)


@torch.library.custom_op("hf_dis::exact_part_sums", mutates_args=())
def part_sums(
    logits: Tensor,
    teacher: Tensor | None,
    temperature: float,
    scale: float,
    soft_cap: float,
    has_divergence: bool,
    has_label: bool,
) -> Tensor:
    """Sums the exponentials of student and teacher over parts of the classes.

    Args:
        logits: of the student's output layer, ``[n, C]``.
        teacher: its logits, ``[n, C]``, or None.
        temperature: τ > 0.
        scale, soft_cap: as of :class:`hf_dis.models.after_head.AfterHead`; a soft cap of 0 is none.
        has_divergence: sum the student's exponentials at τ.
        has_label: sum the student's exponentials at temperature 1.

    Returns:
        maxima and sums of the student's exponentials at τ and at 1, and of the teacher's at τ, ``[n, 6, P]`` for P
        parts, in float32 or wider.
    """
    logits, teacher = unit_columns(logits), None if teacher is None else unit_columns(teacher)
    out, sizes = _sums(logits), program_sizes(logits.shape[1])
    with torch.cuda.device_of(logits):
        part_sums_kernel[(len(logits), out.shape[2])](
            logits,
            teacher,
            out,
            logits.shape[1],
            out.shape[2],
            logits.stride(0),
            0 if teacher is None else teacher.stride(0),
            temperature,
            scale,
            soft_cap,
            TEACHER=0 if not has_divergence else 2 if teacher is None else 1,
            HAS_LABEL=has_label,
            HAS_CAP=soft_cap != 0,
            **sizes,
            num_warps=8,
        )
    return out


@part_sums.register_fake
def _(logits, teacher, temperature, scale, soft_cap, has_divergence, has_label):
    return _sums(logits)


@torch.library.custom_op("hf_dis::exact_mean_slopes", mutates_args=())
def mean_slopes(
    logits: Tensor,
    teacher: Tensor,
    sums: Tensor,
    temperature: float,
    scale: float,
    soft_cap: float,
    kind: int,
    weight: float,
) -> Tensor:
    """Sums s ψ over parts of the classes, ``[n, P]``, for a divergence other than the forward KL.

    Args:
        logits, teacher, temperature, scale, soft_cap: as for :func:`part_sums`.
        sums: of :func:`part_sums`.
        kind: of the divergence, a value of ``KINDS``.
        weight: of the teacher in the mixture, in (0, 1).
    """
    logits, teacher = unit_columns(logits), unit_columns(teacher)
    out = sums.new_empty(len(sums), sums.shape[2])
    with torch.cuda.device_of(logits):
        mean_slopes_kernel[tuple(out.shape)](
            logits,
            teacher,
            sums,
            out,
            logits.shape[1],
            out.shape[1],
            logits.stride(0),
            teacher.stride(0),
            temperature,
            scale,
            soft_cap,
            weight,
            KIND=kind,
            HAS_CAP=soft_cap != 0,
            **program_sizes(logits.shape[1]),
            BLOCK_PARTS=block_size(out.shape[1], 2**20),
            num_warps=8,
        )
    return out


@mean_slopes.register_fake
def _(logits, teacher, sums, temperature, scale, soft_cap, kind, weight):
    return sums.new_empty(len(sums), sums.shape[2])


def _sums(logits: Tensor) -> Tensor:
    num_parts = triton.cdiv(logits.shape[1], program_sizes(logits.shape[1])["PART"])
    return logits.new_empty(len(logits), 6, num_parts, dtype=sum_dtype(logits))


def program_sizes(num_classes: int) -> dict[str, int]:
    """The classes of a program, and those that it reads at a time."""
    part = block_size(num_classes, PART)
    return {"PART": part, "BLOCK": min(part, BLOCK)}
