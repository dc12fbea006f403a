"""The divergence of the student from the teacher, on sampled classes and on all of them. Pure functions of tensors.

All return one value per item, in float32 or wider. All carry the factor τ² of Hinton et al. (arXiv 1503.02531), so
that the size of the gradient does not depend on the temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import uses_triton
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.targets import block_items, widen


class SampledLoss(NamedTuple):
    """A divergence estimated from sampled classes.

    Attributes:
        loss: per item, ``[N]``, differentiable once in the logits.
        signal: s - p at every column, ``[N, R + K_t]``, without gradient; up to the factor τ the gradient dL/dz of
            exact distillation.
        log_student: log s at every column, ``[N, R + K_t]``, without gradient.
    """

    loss: Tensor
    signal: Tensor
    log_student: Tensor


def sampled_forward_kl(logits: Tensor, sample: ClassSample, temperature: float) -> SampledLoss:
    """τ² KL(p ‖ s), estimated from the sampled classes.

    ``τ² (Σ p̂ (log p - z/τ) + log Ẑ)`` with ``log Ẑ = logsumexp(z/τ + log ω)``. The normaliser makes the estimate
    consistent, not unbiased: its bias falls as 1/K. With all classes sampled for certain it is the exact loss.

    Args:
        logits: the student's, of the sampled classes, ``[N, R + K_t]``.
        sample: the classes, their weights and the teacher's answers.
        temperature: τ > 0, the temperature of the sample.
    """
    return SampledLoss(
        *_SampledForwardKL.apply(logits, sample.log_weights, sample.log_probs, sample.target, temperature)
    )


class _SampledForwardKL(torch.autograd.Function):
    """Loss and gradient in one pass."""

    @staticmethod
    def forward(ctx, logits, log_weights, log_probs, target, temperature):
        if uses_triton(logits.device):
            from hf_dis.loss.triton_sampled import forward_kl
        else:
            forward_kl = _forward_kl
        loss, signal, log_student, gradient = forward_kl(logits, log_weights, log_probs, target, temperature)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(signal, log_student)
        return loss, signal, log_student

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(ctx.dtype), None, None, None, None


def _forward_kl(
    logits: Tensor, log_weights: Tensor, log_probs: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, signal, log s and gradient by blocks of items: intermediate tensors have the size of a block."""
    size = block_items(logits)
    parts = zip(*(tensor.split(size) for tensor in (logits, log_weights, log_probs, target)), strict=True)
    blocks = [_forward_kl_block(*part, temperature) for part in parts]
    return blocks[0] if len(blocks) == 1 else tuple(torch.cat(results) for results in zip(*blocks, strict=True))


def _forward_kl_block(
    logits: Tensor, log_weights: Tensor, log_probs: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scaled = _above_minus_inf(widen(logits) / temperature)
    log_student = scaled - (scaled + log_weights).logsumexp(1, keepdim=True)
    loss = temperature**2 * (target * (_above_minus_inf(log_probs) - log_student)).sum(1)
    signal = log_student.exp() - log_probs.exp()
    # τ (ω s - p̂): the target sums to one.
    gradient = (log_student + log_weights).exp_().sub_(target).mul_(temperature)
    return loss, signal, log_student, gradient.masked_fill_(logits.isneginf(), 0)


def exact_forward_kl(logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """τ² KL(p ‖ s) over all classes, and its gradient τ (s - p) on the student's logits.

    Args:
        logits: the student's, ``[n, C]``, float32 or wider.
        teacher_logits: ``[n, C]``, of the type of the student's.
        temperature: τ > 0.

    Returns:
        the loss ``[n]`` and the gradient ``[n, C]``.
    """
    log_student = _log_softmax(logits, temperature)
    log_teacher = _log_softmax(teacher_logits, temperature)
    teacher = log_teacher.exp()
    loss = temperature**2 * log_teacher.sub_(log_student).mul_(teacher).sum(1)  # autocast would round a product
    gradient = log_student.exp_().sub_(teacher).mul_(temperature)
    return loss, gradient.masked_fill_(logits.isneginf(), 0)


def sparse_forward_kl(
    logits: Tensor, ids: Tensor, log_probs: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """τ² KL(p ‖ s) over all classes and its gradient, for a teacher known at some classes, which stand for all.

    Args:
        logits: the student's, ``[n, C]``, float32 or wider.
        ids: classes of each item, ``[n, R]``.
        log_probs: the teacher's log-probabilities at these classes, finite, ``[n, R]``.
        target: estimated teacher probabilities at these classes, each item sums to one, ``[n, R]``.
        temperature: τ > 0.

    Returns:
        ``τ² Σ p̂ (log p - log s)``, ``[n]``, and the gradient ``[n, C]``.
    """
    log_student = _log_softmax(logits, temperature)
    loss = temperature**2 * (target * (log_probs - log_student.gather(1, ids))).sum(1)
    gradient = log_student.exp_().scatter_add_(1, ids, -target.to(log_student.dtype)).mul_(temperature)
    return loss, gradient.masked_fill_(logits.isneginf(), 0)


def mix(distillation: Tensor, cross_entropy: Tensor | None, hard_label_weight: float) -> Tensor:
    """(1 - λ) KD + λ CE; KD alone where there are no labels."""
    if cross_entropy is None:
        return distillation
    return (1 - hard_label_weight) * distillation + hard_label_weight * cross_entropy


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return _above_minus_inf((logits / temperature).log_softmax(1))


def _above_minus_inf(values: Tensor) -> Tensor:
    """Replaces the -inf of masked classes by the lowest number, so that 0 · log 0 is 0 and not NaN."""
    return values.clamp_min(torch.finfo(values.dtype).min)
