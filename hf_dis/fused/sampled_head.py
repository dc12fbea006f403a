"""The loss of a batch on the sampled classes of a head, where one kernel computes logits, loss and gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import uses_triton
from hf_dis.loss.divergence import Divergence, ForwardKL
from hf_dis.precision import product_type
from hf_dis.sampling.sample import ClassSample
from hf_dis.sampling.tails import by_tail


def is_fused(
    features: Tensor, weight: Tensor, bias: Tensor | None, sample: ClassSample, divergence: Divergence
) -> bool:
    """Returns True if :func:`mean_loss` serves a head and a sample.

    The kernels have to be chosen, the divergence the forward KL, the batch labelled and the head without a bias. The
    rows of an item have to fit a cache between their two uses. In float16 the gradient would be rounded before a
    GradScaler's factor is in it.

    Args:
        features: the head's input, ``[N, d]``.
        weight, bias: of the head, ``[C, d]`` and ``[C]`` or None.
        sample: the classes.
        divergence: of the student from the teacher.
    """
    if not (uses_triton(features.device) and features.requires_grad and torch.is_grad_enabled() and len(features)):
        return False
    from hf_dis.fused.triton_sampled_head import CACHED_BYTES

    rows = sample.item_ids.shape[1] * weight[:1].nbytes
    is_served = bias is None and sample.has_label and isinstance(divergence, ForwardKL)
    return is_served and rows <= CACHED_BYTES and product_type(features) != torch.float16


def mean_loss(
    features: Tensor,
    weight: Tensor,
    sample: ClassSample,
    temperature: float,
    hard_label_weight: float,
    divergence: ForwardKL,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of (1 - λ) KD + λ CE on sampled classes, as :func:`hf_dis.loss.sampled.sampled_loss` has it per item.

    Args:
        features: the head's input, ``[N, d]``.
        weight: of the head, ``[C, d]``.
        sample: the classes, their weights and the teacher's targets.
        temperature: τ > 0, the temperature of the sample.
        hard_label_weight: λ in [0, 1].
        divergence: KD.
        row_sparse: give the weight a sparse gradient, which holds the sampled rows only.

    Returns:
        the loss, a scalar, which alone has a gradient; the signal ``[N, R + K_t]``; and the items whose signal is
        finite, ``[N]``.
    """
    times = temperature**2 if divergence.scale_by_temperature else 1.0
    ids, columns = (sample.item_ids, sample.tail_ids), (sample.log_weights, sample.log_probs, sample.target)
    options = (temperature, times, hard_label_weight), sample.updates, row_sparse, product_type(features)
    with torch.autocast(features.device.type, enabled=False):
        return _MeanLoss.apply(features, weight, *ids, *columns, *options)


class _MeanLoss(torch.autograd.Function):
    """The gradients on the logits, and on the features by the item's own classes, are computed in forward."""

    @staticmethod
    def forward(
        ctx, features, weight, item_ids, tail_ids, log_weights, log_probs, target, numbers, updates, row_sparse, dtype
    ):
        from hf_dis.fused.triton_sampled_head import sampled_head
        from hf_dis.models.triton_gathered import gathered_rows

        ctx.features_dtype, features = features.dtype, features.to(dtype)
        tail_ids = tail_ids[: len(features)]
        rows = gathered_rows(weight, tail_ids, dtype)
        tails = by_tail(features, len(tail_ids)) @ rows.mT
        given = features, weight, item_ids, tails, log_weights, log_probs, target, *numbers
        loss, signal, gradient, own, finite = sampled_head(*given)
        ctx.save_for_backward(features, weight, item_ids, tail_ids, rows, gradient, own)
        ctx.updates, ctx.row_sparse = updates, row_sparse
        ctx.mark_non_differentiable(signal, finite)
        return loss.mean(), signal, finite

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        from hf_dis.fused.triton_sampled_head import scaled_sum
        from hf_dis.head.triton_gradients import HeadGradients

        features, weight, item_ids, tail_ids, rows, gradient, own = ctx.saved_tensors
        factor = grad / len(features)
        of_items, of_tails = gradient.split([item_ids.shape[1], tail_ids.shape[1]], dim=1)
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            tails = by_tail(of_tails, len(tail_ids)) @ rows
            grad_features = scaled_sum(own, tails, factor, ctx.features_dtype)
        if ctx.needs_input_grad[1]:
            found = HeadGradients(features, item_ids, tail_ids, of_items, of_tails, ctx.updates)
            grad_weight = found.weight(weight, ctx.row_sparse, factor)
        return grad_features, grad_weight, *[None] * 9
