"""The divergence of the student from the teacher, on sampled classes and on all of them.

All losses are per item, in float32 or wider. By default they carry the factor τ² of Hinton et al. (arXiv 1503.02531),
so that the size of the gradient does not depend on the temperature. Below, p and s are the probabilities of teacher
and student at the temperature τ, and u = z/τ are the student's scaled logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import uses_triton
from hf_dis.loss.classes import ALL_CLASSES, Classes
from hf_dis.loss.sampled_softmax import above_minus_inf, sampled_log_softmax, times_each
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.targets import block_items

# Loss [N], and signal, log s and gradient on the logits, [N, R + K_t] each.
Results = tuple[Tensor, Tensor, Tensor, Tensor]


class SampledLoss(NamedTuple):
    """A divergence estimated from sampled classes.

    Attributes:
        loss: per item, ``[N]``, differentiable once in the logits.
        signal: the gradient dL/dz of exact distillation at every column, up to a factor, ``[N, R + K_t]``, without
            gradient; s - p for the forward KL.
        log_student: log s at every column, ``[N, R + K_t]``, without gradient.
        finite: as :meth:`hf_dis.sampling.sample.ClassSample.finite_items` finds them, ``[N]``, where the loss was
            computed by a kernel that looks at the signal too; None elsewhere.
    """

    loss: Tensor
    signal: Tensor
    log_student: Tensor
    finite: Tensor | None = None


@dataclass(frozen=True)
class Divergence(ABC):
    """A divergence of the student from the teacher.

    Args:
        scale_by_temperature: multiply loss and gradient by τ².

    Attributes:
        name: as ``divergence`` of :class:`hf_dis.DISArguments`.
        needs_all_teacher_probs: the loss reads the teacher's probability of every class it computes, so that a cache,
            which stores some probabilities, cannot serve it.
        needs_full_support: the loss is infinite where the teacher gives a class the probability 0.
    """

    scale_by_temperature: bool = True

    name: ClassVar[str]
    needs_all_teacher_probs: ClassVar[bool] = True
    needs_full_support: ClassVar[bool] = False

    @property
    def described(self) -> str:
        """The name with its parameters, and the factor, for people to read."""
        own = [f"{one.name} {getattr(self, one.name):g}" for one in fields(self) if one.name != "scale_by_temperature"]
        return ", ".join([self.name, *own, "times τ²" if self.scale_by_temperature else "without the factor τ²"])

    def sampled(self, logits: Tensor, sample: ClassSample, temperature: float) -> SampledLoss:
        """Estimates the loss of every item from the sampled classes.

        Args:
            logits: the student's, of the sampled classes, ``[N, R + K_t]``.
            sample: the classes, their weights and the teacher's targets.
            temperature: τ > 0, the temperature of the sample.
        """
        given = sample.log_weights, sample.log_probs, sample.target
        return SampledLoss(*_Sampled.apply(logits, *given, temperature, self.results))

    def results(
        self, logits: Tensor, log_weights: Tensor, log_probs: Tensor, target: Tensor, temperature: float
    ) -> Results:
        """Computes the loss of every item on sampled classes, with its gradient.

        Args:
            logits: the student's, ``[N, R + K_t]``.
            log_weights, log_probs, target: of the sample, ``[N, R + K_t]`` each.
            temperature: τ > 0.

        Returns:
            the loss ``[N]``; the signal, log s, and the gradient on the logits, ``[N, R + K_t]`` each.
        """
        loss, signal, log_student, gradient = self._results(logits, log_weights, log_probs, target, temperature)
        loss, gradient = self.scaled(loss, gradient, temperature)
        return loss, signal, log_student, gradient

    def exact(
        self, logits: Tensor, teacher_logits: Tensor, temperature: float, classes: Classes = ALL_CLASSES
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss of every item over all classes, and its gradient on the student's logits.

        Args:
            logits: the student's, ``[n, C]``, float32 or wider.
            teacher_logits: ``[n, C]``, of the type of the student's.
            temperature: τ > 0.
            classes: sums over all classes, where the logits are of a part of them.

        Returns:
            the loss ``[n]`` and the gradient ``[n, C]``.
        """
        return self.scaled(*self._exact(logits, teacher_logits, temperature, classes), temperature)

    def scaled(self, loss: Tensor, gradient: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Takes the factor τ² out of a loss and its gradient, in place, unless the divergence has this factor.

        Args:
            loss: with the factor, ``[n]``.
            gradient: with the factor, ``[n, C]``.
            temperature: τ > 0.
        """
        if self.scale_by_temperature:
            return loss, gradient
        return loss.div_(temperature**2), gradient.div_(temperature**2)

    @abstractmethod
    def weighted_signal(self, sample: ClassSample, result: SampledLoss) -> Tensor:
        """The estimated gradient on the logits without its constant factors, ``[N, R + K_t]``.

        Args:
            sample: the classes.
            result: of :meth:`sampled` for these classes.
        """

    @abstractmethod
    def centres(self, sample: ClassSample, result: SampledLoss) -> list[tuple[Tensor, Tensor]]:
        """The corrections of the linearised error of the gradient on the head's input.

        To first order the error is that of a sum over the sampled classes of ``ω_j r_j``, with the residual
        ``r_j = signal_j w_j - Σ_k scale_kj Σ_i factor_ki w_i``. The corrections come from the normalisers, which are
        estimated from the same sample.

        Args:
            sample: the classes.
            result: of :meth:`sampled` for these classes.

        Returns:
            pairs of scales and factors, ``[N, R + K_t]`` each.
        """

    @abstractmethod
    def _results(
        self, logits: Tensor, log_weights: Tensor, log_probs: Tensor, target: Tensor, temperature: float
    ) -> Results:
        """Loss, signal, log s and gradient on sampled classes, with the factor τ²."""

    @abstractmethod
    def _exact(
        self, logits: Tensor, teacher_logits: Tensor, temperature: float, classes: Classes
    ) -> tuple[Tensor, Tensor]:
        """Loss and gradient on all classes, with the factor τ²."""


class _Sampled(torch.autograd.Function):
    """Loss and gradient in one pass."""

    @staticmethod
    def forward(ctx, logits, log_weights, log_probs, target, temperature, results):
        loss, signal, log_student, gradient = results(logits, log_weights, log_probs, target, temperature)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(signal, log_student)
        return loss, signal, log_student

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        (gradient,) = ctx.saved_tensors
        return times_each(grad, gradient, ctx.dtype), None, None, None, None, None


def by_blocks(results: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Computes results by blocks of items and joins them: intermediate tensors have the size of a block.

    Args:
        results: a function of the blocks' tensors.
        *tensors: ``[N, K]`` each.
    """
    size = block_items(tensors[0])
    blocks = [results(*part) for part in zip(*(tensor.split(size) for tensor in tensors), strict=True)]
    return blocks[0] if len(blocks) == 1 else tuple(map(torch.cat, zip(*blocks, strict=True)))


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p ‖ s), the divergence of Hinton et al. (arXiv 1503.02531): the student covers all that the teacher does.

    Estimate: ``Σ p̂ (log p - u) + log Ẑ`` with ``log Ẑ = logsumexp(u + log ω)``. The normaliser makes the estimate
    consistent, not unbiased: its bias falls as 1/K. With all classes sampled with certainty it is the exact loss.
    """

    name: ClassVar[str] = "forward_kl"
    needs_all_teacher_probs: ClassVar[bool] = False

    def weighted_signal(self, sample: ClassSample, result: SampledLoss) -> Tensor:
        """As :meth:`Divergence.weighted_signal`: ``ω s - p̂``."""
        return (result.log_student + sample.log_weights).exp_().sub_(sample.target)

    def centres(self, sample: ClassSample, result: SampledLoss) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`Divergence.centres`: s about its mean row, and p of each stratum about that of the stratum."""
        student = result.log_student.exp()
        pairs = [(student, student * sample.log_weights.exp())]
        # Certain classes keep their probability; the other classes share the rest of their stratum's mass.
        ratio = sample.target.masked_fill(sample.certain, 0)
        minus = sample.log_probs.exp().neg_()
        is_shared = torch.arange(ratio.shape[1], device=ratio.device) >= sample.item_ids.shape[1]
        for stratum in (is_shared, ~is_shared):
            part = ratio * stratum
            mass = part.sum(1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)
            pairs.append((minus * stratum, part / mass))
        return pairs

    def _results(
        self, logits: Tensor, log_weights: Tensor, log_probs: Tensor, target: Tensor, temperature: float
    ) -> Results:
        if uses_triton(logits.device):
            from hf_dis.loss.triton_sampled import forward_kl

            return forward_kl(logits, log_weights, log_probs, target, temperature)

        def block(*tensors: Tensor) -> Results:
            return _forward_kl_block(*tensors, temperature)

        return by_blocks(block, logits, log_weights, log_probs, target)

    def _exact(
        self, logits: Tensor, teacher_logits: Tensor, temperature: float, classes: Classes
    ) -> tuple[Tensor, Tensor]:
        return exact_forward_kl(logits, teacher_logits, temperature, classes)


# The default, with the factor τ².
FORWARD_KL = ForwardKL()


def sampled_forward_kl(logits: Tensor, sample: ClassSample, temperature: float) -> SampledLoss:
    """τ² KL(p ‖ s), estimated from the sampled classes as :meth:`Divergence.sampled` does."""
    return FORWARD_KL.sampled(logits, sample, temperature)


def _forward_kl_block(
    logits: Tensor, log_weights: Tensor, log_probs: Tensor, target: Tensor, temperature: float
) -> Results:
    log_student, log_shares = sampled_log_softmax(logits, log_weights, temperature)
    loss = (above_minus_inf(log_probs) - log_student).mul_(target).sum(1).mul_(temperature**2)
    signal = log_student.exp().sub_(log_probs.exp())
    # τ (ω s - p̂): the target sums to one.
    gradient = log_shares.exp_().sub_(target).mul_(temperature)
    return loss, signal, log_student, gradient.masked_fill_(logits.isneginf(), 0)


def exact_forward_kl(
    logits: Tensor, teacher_logits: Tensor, temperature: float, classes: Classes = ALL_CLASSES
) -> tuple[Tensor, Tensor]:
    """τ² KL(p ‖ s) over all classes, and its gradient τ (s - p) on the student's logits.

    Args:
        logits: the student's, ``[n, C]``, float32 or wider.
        teacher_logits: ``[n, C]``, of the type of the student's.
        temperature: τ > 0.
        classes: sums over all classes, where the logits are of a part of them.

    Returns:
        the loss ``[n]`` and the gradient ``[n, C]``.
    """
    log_student = log_softmax(logits, temperature, classes)
    log_teacher = log_softmax(teacher_logits, temperature, classes)
    teacher = log_teacher.exp()
    terms = log_teacher.sub_(log_student).mul_(teacher)  # autocast would round a product of matrices
    loss = temperature**2 * classes.sum(terms)
    gradient = log_student.exp_().sub_(teacher).mul_(temperature)
    return loss, gradient.masked_fill_(logits.isneginf(), 0)


def sparse_forward_kl(
    logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    target: Tensor,
    temperature: float,
    classes: Classes = ALL_CLASSES,
) -> tuple[Tensor, Tensor]:
    """τ² KL(p ‖ s) over all classes and its gradient, for a teacher known at some classes, which stand for all.

    Args:
        logits: the student's, ``[n, C]``, float32 or wider.
        ids: classes of each item, ``[n, R]``.
        log_probs: the teacher's log-probabilities at these classes, finite, ``[n, R]``.
        target: estimated teacher probabilities at these classes, each item sums to one, ``[n, R]``.
        temperature: τ > 0.
        classes: sums over all classes, where the logits are of a part of them.

    Returns:
        ``τ² Σ p̂ (log p - log s)``, ``[n]``, and the gradient ``[n, C]``.
    """
    log_student = log_softmax(logits, temperature, classes)
    columns, target = classes.columns(ids), classes.only_here(target, ids)
    loss = temperature**2 * classes.sum(target * (log_probs - log_student.gather(1, columns)))
    gradient = log_student.exp_().scatter_add_(1, columns, -target.to(log_student.dtype)).mul_(temperature)
    return loss, gradient.masked_fill_(logits.isneginf(), 0)


def mix(distillation: Tensor, cross_entropy: Tensor | None, hard_label_weight: float) -> Tensor:
    """(1 - λ) KD + λ CE; KD alone where there are no labels."""
    if cross_entropy is None:
        return distillation
    return (1 - hard_label_weight) * distillation + hard_label_weight * cross_entropy


def log_softmax(logits: Tensor, temperature: float, classes: Classes = ALL_CLASSES) -> Tensor:
    """log softmax(logits / τ) over all classes, ``[n, C]``, above minus infinity."""
    # At temperature 1 a division would only copy the largest tensor of an exact step.
    return above_minus_inf(classes.log_softmax(logits if temperature == 1 else logits / temperature))
