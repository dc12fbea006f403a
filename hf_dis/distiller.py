"""Distiller: the training step of the method, for any host.

Needs torch alone. A host makes a :class:`Distiller` with :func:`hf_dis.build_distiller`, then per batch::

    with distiller.step(batch) as step:
        loss, terms = step.loss(model(**step.inputs))
        loss.mean().backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_dis.arguments import DISArguments
from hf_dis.head.check import check_head
from hf_dis.head.sampled_linear import sampled_columns
from hf_dis.head.switch import SampledHead
from hf_dis.items import Items, check_labels, split_examples
from hf_dis.loss.divergence import mix, sampled_forward_kl
from hf_dis.loss.exact import Losses, exact_loss, exact_losses
from hf_dis.loss.sampled import sampled_loss
from hf_dis.models.head_features import head_features
from hf_dis.models.tasks import Task, base_model, find_items, split_labels
from hf_dis.report.diagnostics import probe, sample_quality
from hf_dis.sampling.sample import ClassSample, Statistics
from hf_dis.sampling.sampler import ClassSampler
from hf_dis.teacher.cached import TARGETS, CachedTargets, CachedTeacher, stored_items
from hf_dis.teacher.online import OnlineTeacher
from hf_dis.teacher.stream import LogitStream


class Distiller:
    """Owns the teacher, the sampler, the head and the losses of a distillation; makes the step of a batch.

    :func:`hf_dis.build_distiller` makes one from models and arguments.

    Args:
        student: the model that is trained, not wrapped.
        arguments: the settings of the method.
        task: of the student.
        num_classes: C, the classes that teacher and student share, from 0 on.
        sampler: samples the classes of a step; its state belongs in checkpoints.
        teacher: gives the targets in training: the teacher itself, or a cache of its targets.
        head_layers: the linear layers of the student's output head, by name.
        mode: ``"sampled"`` or ``"exact"``.
        row_sparse: give the head row-sparse gradients.
        online_teacher: a teacher at hand, for evaluation and the probe; ``teacher`` where it is one.
        eval_teacher: a cache of targets of the evaluation data.
        student_stream: computes the student's logits in chunks for evaluation; None: evaluation holds all logits.
        label_names: columns of a batch that the student is not given.
        student_columns, teacher_columns: columns of a batch that only one of the models takes.
        precision: the narrowest type that the student computes in, if narrower than its logits.
        reduce: sums a dict of tensors, some of them sparse, over processes.
    """

    def __init__(
        self,
        student: nn.Module,
        arguments: DISArguments,
        *,
        task: Task,
        num_classes: int,
        sampler: ClassSampler,
        teacher: OnlineTeacher | CachedTeacher,
        head_layers: Sequence[str],
        mode: str,
        row_sparse: bool = False,
        online_teacher: OnlineTeacher | None = None,
        eval_teacher: CachedTeacher | None = None,
        student_stream: LogitStream | None = None,
        label_names: Sequence[str] = ("labels",),
        student_columns: frozenset[str] = frozenset(),
        teacher_columns: frozenset[str] = frozenset(),
        precision: torch.dtype | None = None,
        reduce: Callable[[Statistics], Statistics] | None = None,
    ):
        self.student, self.arguments, self.task, self.num_classes = student, arguments, task, num_classes
        self.sampler, self.teacher, self.head_layers, self.mode = sampler, teacher, tuple(head_layers), mode
        self.row_sparse, self.online_teacher, self.eval_teacher = row_sparse, online_teacher, eval_teacher
        self.student_stream, self.label_names, self.precision = student_stream, tuple(label_names), precision
        self.student_columns, self.teacher_columns, self.reduce = student_columns, teacher_columns, reduce
        self._head_is_checked = self._has_checked_values = False

    @property
    def head(self) -> SampledHead:
        """The student's output head."""
        return SampledHead(self.student, self.head_layers, self.row_sparse)

    def count(self, batch: dict[str, Tensor]) -> int:
        """The number of items of a batch, by which a loss is normalised."""
        return len(find_items(self.task, batch, batch.get("labels")))

    @contextmanager
    def step(self, batch: dict[str, Tensor], **options: bool) -> Iterator[Step]:
        """The step of a batch as a context: leave it after backward, then the head is released.

        Args:
            batch: as for :meth:`begin`.
            **options: as for :meth:`begin`.
        """
        try:
            yield self.begin(batch, **options)
        finally:
            self.end()

    def begin(
        self,
        batch: dict[str, Tensor],
        *,
        warming_up: bool = False,
        holds_logits: bool = True,
        check_values: bool | None = None,
    ) -> Step:
        """Asks the teacher, samples classes and switches the student's head; call :meth:`end` after backward.

        Args:
            batch: inputs and labels, on the student's device.
            warming_up: compute all classes, the sampler learns meanwhile; in ``"sampled"`` mode only.
            holds_logits: the student's logits are wanted in evaluation. If False and the student can be split before
                its head, its logits exist in chunks only, and ``outputs.logits`` mean nothing.
            check_values: look for labels out of range and for NaN; waits for an accelerator. None: always on a
                processor, at the first batch elsewhere.

        Returns:
            the step: give ``step.inputs`` to the student and its outputs to ``step.loss``.

        Raises:
            ValueError: if labels are out of range or of another shape, or the head cannot be switched.
            DataError: if a cache does not hold the targets of the batch.
            FloatingPointError: if the teacher answers NaN or Inf.
        """
        if check_values is None:
            on_cpu = next(iter(batch.values())).device.type == "cpu"
            check_values = on_cpu or not self._has_checked_values
        self._has_checked_values = True
        items, inputs, teacher_inputs = self._split(batch, check_values)
        request = Request(items, inputs, teacher_inputs, check_values)
        if not self.student.training:
            return EvaluationStep(self, request, holds_logits)
        if self.mode == "exact":
            return ExactStep(self, request)
        if not self._head_is_checked:
            check_head(self.student, self.head, next(split_examples(inputs, items.num_examples, 2)), self.precision)
            self._head_is_checked = True
            if self.arguments.probe_steps and self.student_stream is not None:
                self.student_stream.splits(inputs, items)  # compared while the head is not switched
        return (WarmupStep if warming_up else SampledStep)(self, request)

    def end(self) -> None:
        """Releases the head: the student is an ordinary model again."""
        if self.head_layers:
            self.head.clear()

    def _split(
        self, batch: dict[str, Tensor], check_values: bool
    ) -> tuple[Items, dict[str, Tensor], dict[str, Tensor]]:
        """The items of a batch, and the inputs of student and teacher."""
        batch = dict(batch)
        found = batch.pop(TARGETS, None)
        items, inputs = split_labels(self.student, self.task, batch, self.label_names)
        if items.labels is not None and check_values:
            check_labels(items.labels, self.num_classes)
        if found is not None:
            items = replace(items, targets=found[:, 0] if items.positions is None else stored_items(found))
        mine, theirs = (
            {name: value for name, value in inputs.items() if name not in columns}
            for columns in (self.teacher_columns, self.student_columns)
        )
        return items, mine, theirs

    def router_loss(self, outputs: Any) -> Tensor | float:
        """The load-balancing loss of a mixture of experts, which its forward adds only to a loss of its own."""
        balance = getattr(outputs, "aux_loss", None)
        if balance is None:
            return 0.0
        return base_model(self.student).config.get_text_config().router_aux_loss_coef * balance


class Request(NamedTuple):
    """What the steps are made from.

    Attributes:
        items: of the batch.
        inputs: of the student, without labels.
        teacher_inputs: of the teacher.
        check_values: look into tensors, which waits for an accelerator.
    """

    items: Items
    inputs: dict[str, Tensor]
    teacher_inputs: dict[str, Tensor]
    check_values: bool


class ExactStep:
    """A training step on all classes.

    Args:
        distiller: that makes the step.
        request: the batch.

    Attributes:
        inputs: what the student is to be given.
        items: of the batch.
    """

    def __init__(self, distiller: Distiller, request: Request):
        self.distiller, self.items, self.inputs = distiller, request.items, request.inputs
        self.request = request
        self._at_positions = bool(distiller.head_layers) and request.items.positions is not None
        if self._at_positions:
            distiller.head.set_positions(request.items.positions)

    def loss(self, outputs: Any) -> tuple[Tensor, Losses]:
        """The loss of every item ``[N]``, and its terms ``kd_loss`` and ``ce_loss`` ``[N]`` without gradient."""
        loss, terms = self._of_logits(outputs, self._teacher())
        return loss + self.distiller.router_loss(outputs), terms

    def quality(self) -> dict[str, Tensor]:
        """Nothing was sampled."""
        return {}

    def _teacher(self) -> Iterator[Tensor | CachedTargets] | None:
        """The teacher's answer on all classes; None where only the labels count."""
        distiller, request = self.distiller, self.request
        if distiller.arguments.hard_label_weight == 1 and self.items.labels is not None:
            return None
        return distiller.teacher.all_classes(request.teacher_inputs, self.items, request.check_values)

    def _of_logits(self, outputs: Any, teacher: Iterable[Tensor | CachedTargets] | None) -> tuple[Tensor, Losses]:
        settings = self.distiller.arguments
        logits = outputs.logits if self._at_positions else self.items.of(outputs.logits)
        size, labels = self.distiller.num_classes, self.items.labels
        return exact_loss(logits, size, teacher, labels, settings.temperature, settings.hard_label_weight)


class WarmupStep(ExactStep):
    """A training step on all classes in which the sampler learns from the classes that it would have sampled."""

    def loss(self, outputs: Any) -> tuple[Tensor, Losses]:
        """As :meth:`ExactStep.loss`."""
        distiller, request = self.distiller, self.request
        targets = list(distiller.teacher(request.teacher_inputs, self.items, request.check_values))
        self.sample = distiller.sampler.sample(targets, self.items.labels)
        loss, terms = self._of_logits(outputs, (chunk.all_classes() for chunk in targets))
        logits = outputs.logits if self._at_positions else self.items.of(outputs.logits)
        logits = sampled_columns(logits.detach(), self.sample.item_ids, self.sample.tail_ids)
        self.result = sampled_forward_kl(logits, self.sample, distiller.arguments.temperature)
        distiller.sampler.learn(self.sample, self.result.signal, distiller.reduce)
        return loss + distiller.router_loss(outputs), terms

    def quality(self) -> dict[str, Tensor]:
        """As :meth:`SampledStep.quality`."""
        return sample_quality(self.sample, self.result)

    def probe(self) -> dict[str, Tensor]:
        """As :meth:`SampledStep.probe`."""
        return _probe(self.distiller, self.request, self.sample)


class SampledStep:
    """A training step on sampled classes: the teacher has answered, the head is switched.

    Args:
        distiller: that makes the step.
        request: the batch.

    Attributes:
        inputs: what the student is to be given.
        items: of the batch.
        sample: the classes.
    """

    def __init__(self, distiller: Distiller, request: Request):
        self.distiller, self.items, self.inputs = distiller, request.items, request.inputs
        self.request = request
        targets = distiller.teacher(request.teacher_inputs, self.items, request.check_values)
        self.sample: ClassSample = distiller.sampler.sample(targets, self.items.labels)
        sample = self.sample
        distiller.head.set(sample.item_ids, sample.tail_ids, self.items.positions, sample.updates)

    def loss(self, outputs: Any) -> tuple[Tensor, Losses]:
        """The loss of every item ``[N]``, and its terms ``kd_loss`` and ``ce_loss`` ``[N]`` without gradient.

        The sampler learns from the signal of the step.

        Args:
            outputs: of the student for :attr:`inputs`; its logits are ``[N, R + K_t]``.
        """
        distiller, settings = self.distiller, self.distiller.arguments
        loss, terms, self.result = sampled_loss(
            outputs.logits, self.sample, settings.temperature, settings.hard_label_weight
        )
        distiller.sampler.learn(self.sample, self.result.signal, distiller.reduce)
        return loss + distiller.router_loss(outputs), terms

    def quality(self) -> dict[str, Tensor]:
        """Effective sample size, coverage and share of certain classes of every item, ``[N]``; after :meth:`loss`."""
        return sample_quality(self.sample, self.result)

    def probe(self) -> dict[str, Tensor]:
        """Sampled loss and gradient of the batch against the exact ones; see :func:`hf_dis.report.diagnostics.probe`.

        Raises:
            ValueError: if the student cannot be split before its head.
        """
        return _probe(self.distiller, self.request, self.sample)


class EvaluationStep:
    """The losses of a batch on all classes, without gradient.

    Args:
        distiller: that makes the step.
        request: the batch.
        holds_logits: if False, the student's logits exist in chunks only where it can be split before its head.

    Attributes:
        inputs: what the student is to be given.
        items: of the batch.
    """

    def __init__(self, distiller: Distiller, request: Request, holds_logits: bool):
        self.distiller, self.items, self.inputs = distiller, request.items, request.inputs
        self.request, self._held = request, None
        stream = distiller.student_stream
        if not holds_logits and stream is not None and stream.splits(request.inputs, request.items):
            self._held = distiller.head.hold(request.items.positions)

    def loss(self, outputs: Any) -> tuple[Tensor, Losses]:
        """The loss of every item ``[N]``; its terms ``kd_loss`` and ``ce_loss``, and ``kl``, the divergence at
        temperature 1, as far as they are known.

        Raises:
            ValueError: if there are neither labels nor a teacher.
        """
        distiller, settings = self.distiller, self.distiller.arguments
        terms = exact_losses(
            self._student(outputs),
            len(self.items),
            distiller.num_classes,
            self._teacher(),
            self.items.labels,
            settings.temperature,
            with_kl=True,
        )
        if not terms:
            raise ValueError(
                "there is nothing to evaluate: the data has no labels, and there is no teacher for it. Pass "
                "teacher_model, or eval_teacher_cache, beside teacher_cache"
            )
        ce = terms.get("ce_loss")
        return (mix(terms["kd_loss"], ce, settings.hard_label_weight) if "kd_loss" in terms else ce), terms

    def _student(self, outputs: Any) -> Callable[[slice], Tensor]:
        if self._held is None:
            return lambda chunk: self.items.of(outputs.logits, chunk)
        self.distiller.end()  # the head is applied to chunks of what it was given
        features = self._held.features
        return lambda chunk: self.distiller.student_stream.of_features(features[chunk])

    def _teacher(self) -> Iterator[Tensor | CachedTargets] | None:
        distiller, request = self.distiller, self.request
        teacher = distiller.online_teacher if self.items.targets is None else distiller.eval_teacher
        return teacher and teacher.all_classes(request.teacher_inputs, self.items, request.check_values)


Step = SampledStep | WarmupStep | ExactStep | EvaluationStep


def _probe(distiller: Distiller, request: Request, sample: ClassSample) -> dict[str, Tensor]:
    stream, head = distiller.student_stream, distiller.head
    if stream is None or not stream.splits(request.inputs, request.items):
        raise ValueError(
            f"probe_steps is {distiller.arguments.probe_steps}, but {type(distiller.student).__name__} computes its "
            "logits from more than one vector per item, or by more than its output head: set probe_steps to 0"
        )
    weight, bias = head.weight_and_bias()
    features = request.items.of(head_features(distiller.student, head.module, request.inputs))
    teacher = distiller.online_teacher.all_classes(request.teacher_inputs, request.items, check_values=False)
    temperature = distiller.arguments.temperature
    return probe(weight, bias, features, sample, teacher, temperature, stream.after_head._replace(bias=None))
