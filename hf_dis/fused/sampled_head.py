"""The loss of a batch on the sampled classes of a head, where one kernel computes logits, loss and gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import uses_triton
from hf_dis.loss.divergence import Divergence, ForwardKL
from hf_dis.precision import product_type
from hf_dis.sampling.by_kernels import SampleWithoutTails
from hf_dis.sampling.sampler import ClassSampler
from hf_dis.sampling.tails import by_tail


def is_fused(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    sampler: ClassSampler,
    divergence: Divergence,
) -> bool:
    """Returns True if :func:`mean_loss` serves a head and the samples of a sampler.

    The kernels have to be chosen, the divergence the forward KL, the batch labelled and the head without a bias. The
    rows of an item have to fit a cache between their two uses. In float16 the gradient would be rounded before a
    GradScaler's factor is in it.

    Args:
        features: the head's input, ``[N, d]``.
        weight, bias: of the head, ``[C, d]`` and ``[C]`` or None.
        labels: class ids ``[N]``, or None.
        sampler: of the classes.
        divergence: of the student from the teacher.
    """
    if not (uses_triton(features.device) and features.requires_grad and torch.is_grad_enabled() and len(features)):
        return False
    from hf_dis.fused.triton_sampled_head import CACHED_BYTES

    rows = (sampler.num_sampled + 1) * weight[:1].nbytes
    is_served = bias is None and labels is not None and sampler.leaves_tails and isinstance(divergence, ForwardKL)
    return is_served and rows <= CACHED_BYTES and product_type(features) != torch.float16


def mean_loss(
    features: Tensor,
    weight: Tensor,
    sample: SampleWithoutTails,
    temperature: float,
    hard_label_weight: float,
    divergence: ForwardKL,
    row_sparse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of (1 - λ) KD + λ CE on sampled classes, as :func:`hf_dis.loss.sampled.sampled_loss` has it per item.

    Args:
        features: the head's input, ``[N, d]``.
        weight: of the head, ``[C, d]``.
        sample: the classes, their weights and the teacher's targets, with labels.
        temperature: τ > 0, the temperature of the sample.
        hard_label_weight: λ in [0, 1].
        divergence: KD.
        row_sparse: give the weight a sparse gradient, which holds the sampled rows only.

    Returns:
        the loss, a scalar, which alone has a gradient; the signal ``[N, R + K_t]``; and the items whose signal is
        finite, ``[N]``.
    """
    times = temperature**2 if divergence.scale_by_temperature else 1.0
    options = (temperature, times, hard_label_weight), row_sparse, product_type(features)
    with torch.autocast(features.device.type, enabled=False):
        return _MeanLoss.apply(features, weight, sample, *options)


class _MeanLoss(torch.autograd.Function):
    """The gradients on the logits, and on the features by the item's own classes, are computed in forward."""

    @staticmethod
    def forward(ctx, features, weight, sample, numbers, row_sparse, dtype):
        from hf_dis.fused.triton_sampled_head import sampled_head
        from hf_dis.models.triton_gathered import gathered_rows

        ctx.features_dtype, features = features.dtype, features.to(dtype)
        item_ids, tail_ids = sample.item_ids, sample.tail_ids[: len(features)]
        rows = gathered_rows(weight, tail_ids, dtype)
        tails = by_tail(features, len(tail_ids)) @ rows.mT
        of_items = [sample.log_weights, sample.log_probs, sample.target]
        of_tails = [tail_ids, sample.inclusion, sample.tail_log_probs, sample.tail_mass]
        given = features, weight, item_ids, of_items, tails, of_tails, sample.held_ids
        loss, signal, *gradients, finite = sampled_head(*given, *numbers)
        ctx.save_for_backward(features, weight, item_ids, tail_ids, rows, *gradients)
        ctx.updates, ctx.row_sparse = sample.updates, row_sparse
        ctx.mark_non_differentiable(signal, finite)
        return loss.mean(), signal, finite

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        from hf_dis.fused.triton_tails_gradient import tails_gradient
        from hf_dis.head.triton_gradients import HeadGradients

        features, weight, item_ids, tail_ids, rows, of_items, of_tails, own = ctx.saved_tensors
        factor = grad / len(features)
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_features = tails_gradient(of_tails, rows, own, factor, ctx.features_dtype)
        if ctx.needs_input_grad[1]:
            found = HeadGradients(features, item_ids, tail_ids, of_items, of_tails, ctx.updates)
            grad_weight = found.weight(weight, ctx.row_sparse, factor)
        return grad_features, grad_weight, *[None] * 4
