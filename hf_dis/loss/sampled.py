"""The loss on sampled classes: divergence and cross-entropy, mixed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import uses_triton
from hf_dis.loss.cross_entropy import cross_entropy_results
from hf_dis.loss.divergence import FORWARD_KL, Divergence, ForwardKL, SampledLoss
from hf_dis.loss.objective import Losses
from hf_dis.loss.sampled_softmax import times_each
from hf_dis.sampling.sample import ClassSample


def sampled_loss(
    logits: Tensor,
    sample: ClassSample,
    temperature: float,
    hard_label_weight: float,
    divergence: Divergence = FORWARD_KL,
) -> tuple[Tensor, Losses, SampledLoss]:
    """The loss of every item on sampled classes, (1 - λ) KD + λ CE; KD alone without labels.

    Args:
        logits: the student's, of the sampled classes, ``[N, R + K_t]``.
        sample: the classes, their weights and the teacher's targets.
        temperature: τ > 0, the temperature of the sample.
        hard_label_weight: λ in [0, 1].
        divergence: of the student from the teacher, KD.

    Returns:
        the loss ``[N]``, which alone has a gradient; its terms ``kd_loss`` and, with labels, ``ce_loss``, ``[N]``; and
        KD with its signal.
    """
    if not sample.has_label:
        result = divergence.sampled(logits, sample, temperature)
        return result.loss, {"kd_loss": result.loss.detach()}, result
    given = sample.log_weights, sample.log_probs, sample.target, sample.label_column
    if isinstance(divergence, ForwardKL) and uses_triton(logits.device):
        from hf_dis.loss.triton_sampled import SampledMixture

        times = temperature**2 if divergence.scale_by_temperature else 1.0
        loss, kd, ce, *others = SampledMixture.apply(logits, *given, temperature, times, hard_label_weight)
    else:
        loss, kd, ce, *others = _Mixture.apply(logits, *given, temperature, hard_label_weight, divergence)
    return loss, {"kd_loss": kd, "ce_loss": ce}, SampledLoss(kd, *others)


def finite_items(gradient: Tensor) -> Tensor:
    """True for items whose signal is finite at every column that they use, ``[N]``.

    Finds them as :meth:`hf_dis.sampling.sample.ClassSample.finite_items`, and without a pass that masks columns.

    Args:
        gradient: of the mixture on the logits, zero at columns that are not used, ``[N, R + K_t]``.
    """
    return torch.linalg.vector_norm(gradient, 1, dim=1) < torch.inf


class _Mixture(torch.autograd.Function):
    """Both losses and their gradient in forward, so that backward is one product."""

    @staticmethod
    def forward(ctx, logits, log_weights, log_probs, target, label, temperature, hard_label_weight, divergence):
        kd, signal, log_student, gradient = divergence.results(logits, log_weights, log_probs, target, temperature)
        ce, of_ce = cross_entropy_results(logits, log_weights, label)
        loss = torch.lerp(kd, ce.to(kd.dtype), hard_label_weight)
        gradient.lerp_(of_ce.to(gradient.dtype), hard_label_weight)
        finite = None if logits.device.type == "cpu" else finite_items(gradient)  # a processor looks at one sum
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kd, ce, signal, log_student, *(() if finite is None else (finite,)))
        return loss, kd, ce, signal, log_student, finite

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        (gradient,) = ctx.saved_tensors
        return times_each(grad, gradient, ctx.dtype), *(None,) * 7
