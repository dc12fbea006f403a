"""Losses of other packages that head_scaling.py and language_model.py measure, and the bare product of a head.

The functions return a scalar, the mean over items, and take tensors on any device. Within autocast the products are
in its type. ``beta`` is that of both packages: 0 for the forward KL, 1 for the reverse KL, between them the
Jensen-Shannon divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The module that a method needs.
NEEDS = {
    "trl_gkd": "trl.experimental.gkd",
    "trl_chunked": "trl.kernels.chunked_divergence",
    "liger": "liger_kernel.chunked_loss",
    "liger_kl": "liger_kernel.transformers.fused_linear_kl_div",
}

# Logits that the bare product makes at a time: 64 MiB in float32 on a processor, 512 MiB in bfloat16 on a device.
CHUNK, DEVICE_CHUNK = 2**24, 2**28


def trl_gkd(logits: Tensor, teacher_logits: Tensor, labels: Tensor, beta: float = 0.0) -> Tensor:
    """TRL's loss on all logits, ``[N, V]`` each; labels ``[N]`` only mark the items that count."""
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(logits[None], teacher_logits[None], labels[None], beta=beta)


def trl_chunked(
    features: Tensor, weight: Tensor, teacher_features: Tensor, teacher_weight: Tensor, beta: float = 0.0
) -> Tensor:
    """TRL's loss from features and heads in tiles, with a gradient in backward; TRL also computes an entropy."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (features, weight, None), (teacher_features, teacher_weight, None)
    temperature, scale, soft_cap = 1.0, 1.0, None
    settings = (beta, temperature, scale, soft_cap, scale, soft_cap)
    return ChunkedDivergenceFunction.apply(*student, *teacher, *settings)[0].mean()


def liger_jsd(
    features: Tensor,
    weight: Tensor,
    teacher_features: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Liger's loss from features and heads by chunks; compiled on a device, as by Liger's default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    compiled = features.device.type != "cpu"
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=compiled
    )
    return loss(features, weight, teacher_features, teacher_weight, labels)


def liger_kl(features: Tensor, weight: Tensor, probabilities: Tensor) -> Tensor:
    """Liger's loss from features, head and the teacher's probabilities ``[N, V]``, by chunks in Triton."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    return LigerFusedLinearKLDivLoss()(features, weight, probabilities)


def head_product(features: Tensor, weight: Tensor) -> Tensor:
    """The three products that every loss on all classes needs, by chunks of items: a floor, and no loss.

    Logits are computed, and gradients of features and weight as if the logits were their own gradient.

    Args:
        features: ``[N, d]``.
        weight: ``[V, d]``.
    """
    return _HeadProduct.apply(features, weight)


class _HeadProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight):
        device = features.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else features.dtype
        vectors, rows = features.to(dtype), weight.to(dtype)
        grad_vectors, grad_rows = torch.empty_like(vectors), torch.zeros_like(rows)
        size = max(1, (CHUNK if device == "cpu" else DEVICE_CHUNK) // len(rows))
        for part, grad_part in zip(vectors.split(size), grad_vectors.split(size), strict=True):
            logits = part @ rows.T
            torch.mm(logits, rows, out=grad_part)
            grad_rows.addmm_(logits.T, part)
        ctx.gradients = grad_vectors.to(features.dtype), grad_rows.to(weight.dtype)
        return features.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.gradients
