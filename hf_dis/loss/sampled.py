"""The loss on sampled classes: divergence and cross-entropy, mixed."""

from __future__ import annotations

from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.loss.cross_entropy import sampled_cross_entropy
from hf_dis.loss.divergence import FORWARD_KL, Divergence, ForwardKL, SampledLoss, mix
from hf_dis.loss.objective import Losses
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
        sample: the classes, their weights and the teacher's answers.
        temperature: τ > 0, the temperature of the sample.
        hard_label_weight: λ in [0, 1].
        divergence: of the student from the teacher, KD.

    Returns:
        the loss ``[N]``, which alone has a gradient; its terms ``kd_loss`` and, with labels, ``ce_loss``, ``[N]``; and
        KD with its signal.
    """
    if sample.has_label and isinstance(divergence, ForwardKL) and uses_triton(logits.device):
        from hf_dis.loss.triton_sampled import SampledMixture

        given = sample.log_weights, sample.log_probs, sample.target, sample.label_column
        times = temperature**2 if divergence.scale_by_temperature else 1.0
        loss, kd, ce, *others = SampledMixture.apply(logits, *given, temperature, times, hard_label_weight)
        return loss, {"kd_loss": kd, "ce_loss": ce}, SampledLoss(kd, *others)
    result = divergence.sampled(logits, sample, temperature)
    terms = {"kd_loss": result.loss.detach()}
    if not sample.has_label:
        return result.loss, terms, result
    ce = sampled_cross_entropy(logits, sample)
    terms["ce_loss"] = ce.detach()
    return mix(result.loss, ce, hard_label_weight), terms, result
