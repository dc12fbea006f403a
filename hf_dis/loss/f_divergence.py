"""Divergences that are sums of ``s φ(p / s)`` over the classes: reverse KL, Jensen-Shannon and skew KL."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import log, log1p
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_dis.arguments import DISArguments, check_divergence
from hf_dis.loss.classes import ALL_CLASSES, Classes
from hf_dis.loss.divergence import Divergence, ForwardKL, Results, SampledLoss, by_blocks, log_softmax
from hf_dis.loss.sampled_softmax import above_minus_inf, sampled_log_softmax
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.targets import widen


class _Densities(NamedTuple):
    """Probabilities of student and teacher, ``[n, K]`` each.

    Attributes:
        log_student, log_teacher: log s and log p, above minus infinity.
        student, teacher: ω s and ω p; s and p on all classes. Each item's ω s sums to one.
    """

    log_student: Tensor
    log_teacher: Tensor
    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class FDivergence(Divergence):
    """Sums ``s φ(p / s)`` over the classes, with a convex φ of φ(1) = φ'(1) = 0, so that no term is negative.

    Estimate: ``Σ ω ŝ φ(p / ŝ)`` over the sampled classes. ``ŝ = exp(u) / Ẑ`` with ``Ẑ = Σ ω exp(u)``, so that the ω ŝ
    of an item sum to one.

    Gradient: let ``t = p/s`` and ``ψ = φ(t) - t φ'(t)``, the derivative of ``s φ(p/s)`` in s. By
    ``dŝ_i/du_j = ŝ_i (1[i = j] - ω_j ŝ_j)`` the estimate has the gradient ``ω_j ŝ_j (ψ_j - Σ ω ŝ ψ)``. This one is
    the self-normalised estimate of the exact one, ``s_j (ψ_j - Σ s ψ)``. The signal is this gradient without ω_j.

    Bias: Ẑ is unbiased, and so is the sum for a given normaliser. The estimate is a smooth function of both. So the
    estimate is consistent, and its bias falls as 1/K. With all classes sampled with certainty it is the exact loss.

    Where student and teacher agree, p/ŝ is the same at all classes, so that the gradient is zero whatever the sample.
    """

    def weighted_signal(self, sample: ClassSample, result: SampledLoss) -> Tensor:
        """As :meth:`Divergence.weighted_signal`: ω times the signal."""
        return sample.log_weights.exp().mul_(result.signal)

    def centres(self, sample: ClassSample, result: SampledLoss) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`Divergence.centres`.

        The gradient is ``Σ s ψ w - (Σ s ψ)(Σ s w)`` with three sums that the normaliser divides. Their linearised
        errors add up to the residual ``signal_j (w_j - Σ s w) - s_j g``.
        """
        student = result.log_student.exp()
        weighted = student * sample.log_weights.exp()
        return [(result.signal, weighted), (student, self.weighted_signal(sample, result))]

    @abstractmethod
    def _terms(self, given: _Densities) -> tuple[Tensor, Tensor]:
        """ψ ``[n, K]``, up to a constant per item, and ``s φ(p / s)``, weighted, ``[n, K]``."""

    def _results(
        self, logits: Tensor, log_weights: Tensor, log_probs: Tensor, target: Tensor, temperature: float
    ) -> Results:
        def block(logits: Tensor, log_weights: Tensor, log_probs: Tensor) -> Results:
            log_student, log_shares = sampled_log_softmax(logits, log_weights, temperature)
            log_teacher = above_minus_inf(widen(log_probs))
            weighted = log_shares.exp_(), (log_teacher + log_weights).exp_()
            loss, centred, share = self._losses(_Densities(log_student, log_teacher, *weighted), temperature)
            signal = log_student.exp().mul_(centred)
            gradient = share.mul_(centred).mul_(temperature)
            return loss, signal, log_student, gradient.masked_fill_(logits.isneginf(), 0)

        return by_blocks(block, logits, log_weights, log_probs)

    def _exact(
        self, logits: Tensor, teacher_logits: Tensor, temperature: float, classes: Classes
    ) -> tuple[Tensor, Tensor]:
        log_student, log_teacher = (log_softmax(values, temperature, classes) for values in (logits, teacher_logits))
        given = _Densities(log_student, log_teacher, log_student.exp(), log_teacher.exp())
        loss, centred, student = self._losses(given, temperature, classes)
        return loss, student.mul_(centred).mul_(temperature).masked_fill_(logits.isneginf(), 0)

    def _losses(
        self, given: _Densities, temperature: float, classes: Classes = ALL_CLASSES
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss ``[n]``, ψ - Σ ω s ψ and ω s, ``[n, K]`` each."""
        slope, terms = self._terms(given)
        mean = classes.sum(given.student * slope)[:, None]
        return temperature**2 * classes.sum(terms), slope.sub_(mean), given.student


@dataclass(frozen=True)
class ReverseKL(FDivergence):
    """KL(s ‖ p): the student keeps to what the teacher finds likely. Infinite where the teacher masks a class.

    ``s φ = s (log s - log p) - s + p`` and ``ψ = log s - log p``.
    """

    name: ClassVar[str] = "reverse_kl"
    needs_full_support: ClassVar[bool] = True

    def _terms(self, given: _Densities) -> tuple[Tensor, Tensor]:
        slope = given.log_student - given.log_teacher
        return slope, (given.student * slope).sub_(given.student).add_(given.teacher)


@dataclass(frozen=True)
class JensenShannon(FDivergence):
    """β KL(p ‖ m) + (1 - β) KL(s ‖ m) with m = β p + (1 - β) s, as in GKD (arXiv 2306.13649).

    Divided by β the limit β → 0 is the forward KL; divided by 1 - β the limit β → 1 is the reverse KL. With
    ``m = β p + (1 - β) s`` class by class, ``s φ = β p (log p - log m) + (1 - β) s (log s - log m)`` and ``ψ = (1 - β)
    (log s - log m)``.

    Args:
        beta: β in (0, 1), the weight of the teacher.
    """

    beta: float = 0.5
    name: ClassVar[str] = "jsd"

    def _terms(self, given: _Densities) -> tuple[Tensor, Tensor]:
        beta = self.beta
        log_mixture = _log_mixture(given, beta)
        slope = (given.log_student - log_mixture).mul_(1 - beta)
        of_teacher = (given.log_teacher - log_mixture).mul_(given.teacher)
        return slope, (given.student * slope).add_(of_teacher, alpha=beta)


@dataclass(frozen=True)
class SkewKL(FDivergence):
    """KL(p ‖ m) with m = α p + (1 - α) s, the skew KL of DistiLLM (arXiv 2402.03898): the forward KL, bounded.

    ``s φ = p (log p - log m) - (1 - α) (p - s)`` and ``ψ = -(1 - α) p / m``.

    Args:
        alpha: α in (0, 1), the teacher's share of the mixture.
    """

    alpha: float = 0.1
    name: ClassVar[str] = "skew_kl"

    def _terms(self, given: _Densities) -> tuple[Tensor, Tensor]:
        log_ratio = given.log_teacher - _log_mixture(given, self.alpha)
        rest = 1 - self.alpha
        terms = (given.teacher * log_ratio).add_(given.student - given.teacher, alpha=rest)
        return log_ratio.exp_().mul_(-rest), terms


def make_divergence(
    name: str, jsd_beta: float | None = None, skew_alpha: float | None = None, scale_by_temperature: bool = True
) -> Divergence:
    """Makes a divergence from the settings of :class:`hf_dis.DISArguments`.

    Args:
        name: of the divergence.
        jsd_beta: β of ``"jsd"``; None: 0.5.
        skew_alpha: α of ``"skew_kl"``; None: 0.1.
        scale_by_temperature: multiply loss and gradient by τ².

    Raises:
        TypeError, ValueError: as :func:`hf_dis.arguments.check_divergence`.
    """
    check_divergence(name, jsd_beta, skew_alpha)
    if name == "jsd":
        return JensenShannon(scale_by_temperature, *([] if jsd_beta is None else [jsd_beta]))
    if name == "skew_kl":
        return SkewKL(scale_by_temperature, *([] if skew_alpha is None else [skew_alpha]))
    return (ForwardKL if name == "forward_kl" else ReverseKL)(scale_by_temperature)


def divergence_of(arguments: DISArguments) -> Divergence:
    """Makes the divergence that the settings choose.

    Args:
        arguments: the settings of the method.
    """
    given = arguments.jsd_beta, arguments.skew_alpha, arguments.scale_by_temperature
    return make_divergence(arguments.divergence, *given)


def _log_mixture(given: _Densities, of_teacher: float) -> Tensor:
    """The logarithm of a mixture of p and s, class by class."""
    return torch.logaddexp(given.log_student + log1p(-of_teacher), given.log_teacher + log(of_teacher))
