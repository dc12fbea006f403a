"""The loss on sampled classes: divergence and cross-entropy, mixed."""

from __future__ import annotations

from torch import Tensor

from hf_dis.loss.cross_entropy import sampled_cross_entropy
from hf_dis.loss.divergence import SampledLoss, mix, sampled_forward_kl
from hf_dis.loss.exact import Losses
from hf_dis.sampling.sample import ClassSample


def sampled_loss(
    logits: Tensor, sample: ClassSample, temperature: float, hard_label_weight: float
) -> tuple[Tensor, Losses, SampledLoss]:
    """The loss of every item on sampled classes, (1 - λ) KD + λ CE; KD alone without labels.

    Args:
        logits: the student's, of the sampled classes, ``[N, R + K_t]``.
        sample: the classes, their weights and the teacher's answers.
        temperature: τ > 0, the temperature of the sample.
        hard_label_weight: λ in [0, 1].

    Returns:
        the loss ``[N]``; its terms ``kd_loss`` and, with labels, ``ce_loss``, ``[N]`` without gradient; and the
        divergence with its signal.
    """
    divergence = sampled_forward_kl(logits, sample, temperature)
    terms = {"kd_loss": divergence.loss.detach()}
    if not sample.has_label:
        return divergence.loss, terms, divergence
    ce = sampled_cross_entropy(logits, sample)
    terms["ce_loss"] = ce.detach()
    return mix(divergence.loss, ce, hard_label_weight), terms, divergence
