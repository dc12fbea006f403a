"""Distillation and cross-entropy losses, on drawn classes and on all of them. Pure functions of tensors.

All return one value a row, computed in float32 or wider whatever the dtype of the logits, and keep the factor τ²
of Hinton et al. (arXiv 1503.02531), so that the gradient's size does not depend on the temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_labels
from .drawn import drawn_logits
from .proposal import Statistics
from .sampler import ClassSampler
from .sampling import ClassDraw
from .targets import TeacherTargets, block_rows, check_teacher_logits, widen


def sampled_distillation_loss(logits: Tensor, draw: ClassDraw, temperature: float) -> tuple[Tensor, Tensor]:
    """τ² KL(p ‖ s), estimated from the drawn classes.

    ``τ² (Σ p̂ (log p - z/τ) + log Ẑ)`` with ``log Ẑ = logsumexp(z/τ + log ω)``. The normaliser makes it consistent
    rather than unbiased: its bias falls as 1/K. With all classes drawn for certain it is the exact loss.

    Args:
        logits: the student's, of the drawn classes, ``[N, R + K_t]``.
        draw: the classes, their weights and the teacher's answers.
        temperature: τ > 0, the one the draw was made at.

    Returns:
        the loss ``[N]``, and the disagreement ``s - p`` at every column ``[N, R + K_t]``, without gradient.
    """
    return _SampledDistillation.apply(logits, draw.log_weights, draw.log_probs, draw.target, temperature)


class _SampledDistillation(torch.autograd.Function):
    """Loss and gradient by blocks of rows: nothing of the size ``[N, R + K_t]`` is made but what is kept of it."""

    @staticmethod
    def forward(ctx, logits, log_weights, log_probs, target, temperature):
        losses, disagreements, gradients = [], [], []
        rows = block_rows(logits)
        for part, log_weight, log_prob, wanted in zip(
            *(tensor.split(rows) for tensor in (logits, log_weights, log_probs, target)), strict=True
        ):
            scaled = _above_minus_inf(widen(part) / temperature)
            log_student = scaled - (scaled + log_weight).logsumexp(1, keepdim=True)
            losses.append(temperature**2 * (wanted * (_above_minus_inf(log_prob) - log_student)).sum(1))
            disagreements.append(log_student.exp() - log_prob.exp())
            # τ (ω s - p̂): the target sums to one.
            gradient = (log_student + log_weight).exp_().sub_(wanted).mul_(temperature)
            gradients.append(gradient.masked_fill_(part.isneginf(), 0).to(logits.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        disagreement = torch.cat(disagreements)
        ctx.mark_non_differentiable(disagreement)
        return torch.cat(losses), disagreement

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (gradient,) = ctx.saved_tensors
        return grad[:, None].to(gradient.dtype) * gradient, None, None, None, None


def sampled_cross_entropy(logits: Tensor, draw: ClassDraw) -> Tensor:
    """-log softmax(z)_y, the normaliser estimated from the drawn classes; the label is always among them.

    Args:
        logits: the student's, of the drawn classes, ``[N, R + K_t]``.
        draw: a draw made with labels.

    Returns:
        the loss, ``[N]``.
    """
    logits = widen(logits)
    return (logits + draw.log_weights).logsumexp(1) - logits[:, draw.label_column]


def exact_distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """τ² KL(p ‖ s) over all classes: ``[N]`` for student and teacher logits ``[N, C]``."""
    student = _above_minus_inf((widen(logits) / temperature).log_softmax(1))
    teacher = _above_minus_inf((widen(teacher_logits) / temperature).log_softmax(1))
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def sparse_distillation_loss(
    logits: Tensor, ids: Tensor, log_probs: Tensor, target: Tensor, temperature: float
) -> Tensor:
    """τ² KL(p ‖ s) over all classes, for a teacher known at some of them, which stand for the others.

    Args:
        logits: the student's, ``[N, C]``.
        ids: classes of each row, ``[N, R]``.
        log_probs: the teacher's, finite, ``[N, R]``.
        target: probabilities estimated of the teacher's, each row sums to one, ``[N, R]``.
        temperature: τ.

    Returns:
        ``τ² Σ p̂ (log p - log s)``, ``[N]``.
    """
    student = _above_minus_inf((widen(logits) / temperature).log_softmax(1))
    return temperature**2 * (target * (log_probs - student.gather(1, ids))).sum(1)


def _above_minus_inf(values: Tensor) -> Tensor:
    """Masked classes have logits of -inf: a number in its place, so that 0 · log 0 is 0 and not NaN."""
    return values.clamp_min(torch.finfo(values.dtype).min)


def exact_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(z)_y over all classes: ``[N]`` for logits ``[N, C]`` and labels ``[N]``."""
    return F.cross_entropy(widen(logits), labels, reduction="none")


def mix(distillation: Tensor, cross_entropy: Tensor | None, hard_label_weight: float) -> Tensor:
    """(1 - λ) KD + λ CE; KD alone where there are no labels."""
    if cross_entropy is None:
        return distillation
    return (1 - hard_label_weight) * distillation + hard_label_weight * cross_entropy


class DISLoss:
    """The sampled loss for loops of one's own: draws, computes the drawn logits, learns from what it saw.

    Args:
        sampler: draws the classes, see :func:`hf_dis.sampler.make_sampler`. Its ``state_dict`` belongs in your
            checkpoints. In a run of several processes give each its own seed, and sum the statistics that
            its proposal learns from, as ``reduce`` does.
        temperature: τ > 0.
        hard_label_weight: λ in [0, 1], the share of cross-entropy; used only where labels are given.
        reduce: sums a dict of tensors, some of them sparse, over processes, as
            :func:`hf_dis.distributed.sum_over_processes` does with accelerate.
        row_sparse_head: give weight and bias sparse gradients, which hold the drawn rows only; for
            :class:`hf_dis.RowSparseAdamW`. ``DistributedDataParallel`` cannot reduce them.

    Example::

        dis_loss = DISLoss(make_sampler(num_classes=100_000))
        loss = dis_loss(features, head.weight, head.bias, teacher_logits, labels)
        loss.backward()
    """

    def __init__(
        self,
        sampler: ClassSampler,
        temperature: float = 2.0,
        hard_label_weight: float = 0.1,
        reduce: Callable[[Statistics], Statistics] | None = None,
        row_sparse_head: bool = False,
    ):
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: it divides the logits and has to be above 0")
        if not 0 <= hard_label_weight <= 1:
            raise ValueError(f"hard_label_weight is {hard_label_weight}: it is a share and has to be within [0, 1]")
        self.sampler, self.temperature, self.hard_label_weight = sampler, temperature, hard_label_weight
        self.reduce, self.row_sparse_head = reduce, row_sparse_head
        self._has_checked_values = False

    def __call__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_logits: Tensor | Iterable[Tensor],
        labels: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of a batch, a scalar.

        Args:
            features: what the head is given, ``[N, d]``.
            weight, bias: the head's, ``[C, d]`` and ``[C]`` or None.
            teacher_logits: ``[N, C]``, or an iterable of chunks of rows that need not exist at the same time.
            labels: class ids ``[N]``.

        Raises:
            ValueError: if sampler, head and teacher are not of the same number of classes, labels are outside them, or
                a shape is another one.
            FloatingPointError: if the teacher's logits hold NaN or Inf. Where looking at values waits for a device,
                they and the labels are looked at in the first batch only.
        """
        num_classes = self.sampler.proposal.num_classes
        if len(weight) != num_classes:
            raise ValueError(f"the sampler is made for {num_classes} classes, the head has {len(weight)}")
        _check_shapes(features, weight, bias, teacher_logits, labels)
        check_values = features.device.type == "cpu" or not self._has_checked_values
        self._has_checked_values = True
        if labels is not None and check_values:
            check_labels(labels, num_classes)

        chunks = [teacher_logits] if isinstance(teacher_logits, Tensor) else teacher_logits
        with torch.no_grad():
            draw = self.sampler.draw(self._ranked(chunks, check_values), labels)
        ids = draw.row_ids, draw.shared_ids
        logits = drawn_logits(features, weight, bias, *ids, self.row_sparse_head, draw.updates)
        kd, disagreement = sampled_distillation_loss(logits, draw, self.temperature)
        ce = None if labels is None else sampled_cross_entropy(logits, draw)
        self.sampler.learn(draw, disagreement, self.reduce)
        return mix(kd, ce, self.hard_label_weight).sum() / max(1, len(features))

    def _ranked(self, chunks: Iterable[Tensor], check_finite: bool) -> Iterator[TeacherTargets]:
        first_row = 0
        for logits in chunks:
            check_teacher_logits(logits, self.sampler.proposal.num_classes, first_row, check_finite)
            first_row += len(logits)
            yield TeacherTargets(logits, self.temperature, self.sampler.rank_depth)
            del logits  # the next chunk may be computed without this one in memory


def _check_shapes(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_logits: Tensor | Iterable[Tensor],
    labels: Tensor | None,
) -> None:
    num_classes, width = weight.shape
    if features.dim() != 2 or features.shape[1] != width:
        raise ValueError(
            f"features have shape {tuple(features.shape)}: the head takes [N, {width}], one row an example or token"
        )
    num_rows = len(features)
    if bias is not None and bias.shape != (num_classes,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}: the head has {num_classes} classes, so it is [{num_classes}]"
        )
    if isinstance(teacher_logits, Tensor) and (teacher_logits.dim() != 2 or len(teacher_logits) != num_rows):
        raise ValueError(
            f"teacher_logits have shape {tuple(teacher_logits.shape)} for features of {num_rows} rows: they have to "
            f"be [{num_rows}, {num_classes}]"
        )
    if labels is not None and labels.shape != (num_rows,):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for features of {num_rows} rows: there has to be one class id a "
            f"row, [{num_rows}]"
        )
