"""Cross-entropy with the labels, on sampled classes and on all of them. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import uses_triton
from hf_dis.loss.classes import ALL_CLASSES, Classes
from hf_dis.loss.divergence import by_blocks
from hf_dis.loss.sampled_softmax import times_each, weighted_log_softmax
from hf_dis.sampling.sample import ClassSample


def sampled_cross_entropy(logits: Tensor, sample: ClassSample) -> Tensor:
    """-log softmax(z)_y, with the normaliser estimated from the sampled classes; the label is always among them.

    Args:
        logits: the student's, of the sampled classes, ``[N, R + K_t]``.
        sample: made with labels.

    Returns:
        the loss, ``[N]``, in float32 or wider, differentiable once in the logits.
    """
    return _Sampled.apply(logits, sample.log_weights, sample.label_column)


class _Sampled(torch.autograd.Function):
    """Loss and gradient in one pass."""

    @staticmethod
    def forward(ctx, logits, log_weights, label):
        loss, gradient = cross_entropy_results(logits, log_weights, label)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return times_each(grad, gradient, ctx.dtype), None, None


def cross_entropy_results(logits: Tensor, log_weights: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """The loss of :func:`sampled_cross_entropy` and its gradient.

    Args:
        logits: the student's, of the sampled classes, ``[N, R + K_t]``.
        log_weights: log ω of these classes, ``[N, R + K_t]``.
        label: the column of the label.

    Returns:
        the loss ``[N]`` and the gradient on the logits, ``[N, R + K_t]``, in float32 or wider.
    """
    if uses_triton(logits.device):
        from hf_dis.loss import triton_sampled

        return triton_sampled.cross_entropy(logits, log_weights, label)

    def block(logits: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        log_shares, minus_normaliser = weighted_log_softmax(logits, log_weights)
        gradient = log_shares.exp_()
        gradient[:, label].sub_(1)
        return -(minus_normaliser[:, 0] + logits[:, label]), gradient

    return by_blocks(block, logits, log_weights)


def exact_cross_entropy(logits: Tensor, labels: Tensor, classes: Classes = ALL_CLASSES) -> tuple[Tensor, Tensor]:
    """-log softmax(z)_y over all classes, and its gradient softmax(z) - onehot(y).

    Args:
        logits: the student's, ``[n, C]``, float32 or wider.
        labels: class ids, ``[n]``.
        classes: sums over all classes, where the logits are of a part of them.

    Returns:
        the loss ``[n]`` and the gradient ``[n, C]``.
    """
    log_student = classes.log_softmax(logits)
    ids = labels[:, None]
    columns = classes.columns(ids)
    chosen = log_student.gather(1, columns)
    minus_one = torch.full_like(chosen, -1)
    loss = -classes.sum(classes.only_here(chosen, ids))
    return loss, log_student.exp_().scatter_add_(1, columns, classes.only_here(minus_one, ids))
