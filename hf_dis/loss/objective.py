"""The loss on all classes and its terms: divergence and cross-entropy of some items, with the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hf_dis.loss.classes import ALL_CLASSES, Classes
from hf_dis.loss.cross_entropy import exact_cross_entropy
from hf_dis.loss.divergence import FORWARD_KL, Divergence, mix, sparse_forward_kl

Losses = dict[str, Tensor]


class Objective(NamedTuple):
    """The loss of every item on all classes: (1 - λ) KD + λ CE.

    Attributes:
        num_classes: C; logits from C on have no part in the loss.
        labels: class ids ``[N]``, or None.
        temperature: τ > 0.
        hard_label_weight: λ in [0, 1].
        divergence: KD; stored targets serve the forward KL alone.
        classes: sums over all classes, where C counts a part of them.
    """

    num_classes: int
    labels: Tensor | None
    temperature: float
    hard_label_weight: float = 0.0
    divergence: Divergence = FORWARD_KL
    classes: Classes = ALL_CLASSES


# Stored targets by class ids, log-probabilities and target; logits; or no teacher.
Answer = tuple[Tensor, Tensor, Tensor] | Tensor | None


def mixture(terms: Losses, objective: Objective) -> Tensor:
    """Mixes the terms to (1 - λ) KD + λ CE, or returns the one that there is, ``[N]``.

    Args:
        terms: ``kd_loss`` or ``ce_loss`` or both, ``[N]``.
        objective: the loss.
    """
    kd, ce = terms.get("kd_loss"), terms.get("ce_loss")
    return ce if kd is None else mix(kd, ce, objective.hard_label_weight)


def objective_losses(
    logits: Tensor, answer: Answer, objective: Objective, items: slice, with_kl: bool
) -> tuple[Losses, Tensor | None]:
    """Computes the terms of some items, ``[n]``, and the gradient of their mixture, ``[n, C]``.

    Args:
        logits: the student's, ``[n, C]``, float32 or wider.
        answer: of the teacher about these items; None: cross-entropy alone.
        objective: the loss of all items.
        items: which of all items these are.
        with_kl: add KL(p ‖ s) and the divergence at temperature 1, as far as the teacher is known at that temperature.
    """
    losses, slopes = {}, []
    if answer is not None:
        losses["kd_loss"], slope = _divergence(
            logits, answer, objective.temperature, objective.divergence, objective.classes
        )
        slopes.append(slope)
        if with_kl:
            losses |= at_temperature_one(
                lambda divergence: _divergence(logits, answer, 1.0, divergence, objective.classes)[0],
                answer,
                objective,
                losses["kd_loss"],
            )
    if objective.labels is not None:
        losses["ce_loss"], slope = exact_cross_entropy(logits, objective.labels[items], objective.classes)
        slopes.append(slope)
    if len(slopes) == 2:
        return losses, slopes[0].lerp_(slopes[1], objective.hard_label_weight)
    return losses, slopes[0] if slopes else None


def _divergence(
    logits: Tensor, answer: Answer, temperature: float, divergence: Divergence, classes: Classes
) -> tuple[Tensor, Tensor]:
    if isinstance(answer, tuple):
        return divergence.scaled(*sparse_forward_kl(logits, *answer, temperature, classes), temperature)
    return divergence.exact(logits, answer.to(logits.dtype), temperature, classes)


def at_temperature_one(
    loss_of: Callable[[Divergence], Tensor], answer: Answer, objective: Objective, kd_loss: Tensor
) -> Losses:
    """KL(p ‖ s) and the objective's divergence at temperature 1, ``[n]``, as far as the teacher is known there.

    Args:
        loss_of: computes a divergence at temperature 1, ``[n]``.
        answer: of the teacher about these items.
        objective: the loss of all items.
        kd_loss: the objective's divergence, ``[n]``.
    """
    chosen, losses = objective.divergence, {}
    for divergence in (FORWARD_KL, chosen):
        name = "kl" if divergence.name == FORWARD_KL.name else divergence.name
        if objective.temperature == 1 and divergence.name == chosen.name:
            losses[name] = kd_loss
        elif isinstance(answer, Tensor) and name not in losses:
            losses[name] = loss_of(divergence)
    return losses
