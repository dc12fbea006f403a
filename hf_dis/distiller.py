"""Distiller: the training step of the method, for any host.

Needs torch alone. A host makes a :class:`Distiller` with :func:`hf_dis.build_distiller`, then per batch::

    with distiller.step(batch) as step:
        loss, terms = step.loss(model(**step.inputs))
        loss.mean().backward()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_dis.arguments import DISArguments
from hf_dis.distributed.replicas import Replicas
from hf_dis.distributed.sums import sum_over_processes
from hf_dis.head.check import check_head, splits_at_head
from hf_dis.head.spread_rows import make_dense
from hf_dis.head.switch import SampledHead
from hf_dis.items import Items, check_labels, first_examples
from hf_dis.loss.divergence import SampledLoss
from hf_dis.loss.f_divergence import divergence_of
from hf_dis.loss.objective import Losses
from hf_dis.models.after_head import AfterHead
from hf_dis.models.columns import separate_columns
from hf_dis.models.tasks import Task, base_model, find_items, split_labels
from hf_dis.report.gradient_error import GradientError, gradient_error
from hf_dis.sampling.sample import ClassSample, Statistics
from hf_dis.sampling.sampler import ClassSampler
from hf_dis.steps import EvaluationStep, ExactStep, Request, SampledStep, Step, WarmupStep
from hf_dis.teacher.cached import TARGETS, CachedTeacher
from hf_dis.teacher.online import OnlineTeacher
from hf_dis.teacher.stream import LogitStream

if TYPE_CHECKING:
    from hf_dis.autotune import HeadCosts


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
        tied_embeddings: names of the embeddings that share the head's weight, whose gradient is then row-sparse too.
        online_teacher: a loaded teacher, for evaluation and the probe; ``teacher`` where it is one.
        eval_teacher: a cache of targets of the evaluation data.
        student_stream: computes the student's logits in chunks for evaluation; None: evaluation holds all logits.
        label_names: columns of a batch that the student is not given.
        precision: the narrowest type that the student computes in, if narrower than its logits.
        costs: of both kinds of steps, where they were timed.
        reduce: sums a dict of tensors, some of them sparse, over processes. The copies of a tensor-parallel student
            are summed over in its place.

    Attributes:
        replicas: the copies of a student that transformers spread over processes by a ``tp_plan``; None of any other
            student.
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
        tied_embeddings: Sequence[str] = (),
        online_teacher: OnlineTeacher | None = None,
        eval_teacher: CachedTeacher | None = None,
        student_stream: LogitStream | None = None,
        label_names: Sequence[str] = ("labels",),
        precision: torch.dtype | None = None,
        costs: HeadCosts | None = None,
        reduce: Callable[[Statistics], Statistics] = sum_over_processes,
    ):
        self.student, self.arguments, self.task, self.num_classes = student, arguments, task, num_classes
        self.sampler, self.teacher, self.head_layers, self.mode = sampler, teacher, tuple(head_layers), mode
        self.row_sparse, self.online_teacher, self.eval_teacher = row_sparse, online_teacher, eval_teacher
        self.student_stream, self.label_names, self.precision = student_stream, tuple(label_names), precision
        self.replicas, self.costs = Replicas.of(student), costs
        # The processes that hold a copy of a tensor-parallel student have the same items, and the same statistics.
        self.reduce = reduce if self.replicas is None else self.replicas.sum if self.replicas.number > 1 else None
        self.tied_embeddings = tuple(tied_embeddings)
        self.divergence = divergence_of(arguments)
        self.student_columns, self.teacher_columns = frozenset(), frozenset()
        if online_teacher is not None:
            self.student_columns, self.teacher_columns = separate_columns(student, online_teacher.model)
        self._head_is_checked = self._has_checked_values = False
        self._splits: bool | None = None
        if sampler.budget is not None and mode == "sampled" and not self.can_estimate_error:
            raise ValueError(
                f"gradient_error is {sampler.budget.accepted}, and the error can be estimated only for an output head "
                "of one layer whose weight is whole on every process. Leave gradient_error out, and set "
                "num_shared_classes by hand"
            )

    @property
    def is_tensor_parallel(self) -> bool:
        """True if transformers spread the student over processes by a ``tp_plan``."""
        return self.replicas is not None

    @property
    def head(self) -> SampledHead:
        """The student's output head."""
        return SampledHead(self.student, self.head_layers, self.row_sparse, self.tied_embeddings)

    def count(self, batch: dict[str, Tensor], positions: Tensor | None = None) -> int:
        """The number of items of a batch, by which a loss is normalised.

        Args:
            batch: as for :meth:`begin`.
            positions: as for :meth:`begin`.
        """
        return len(find_items(self.task, batch, batch.get("labels"), positions=positions))

    @contextmanager
    def step(self, batch: dict[str, Tensor], **options: Any) -> Iterator[Step]:
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
        positions: Tensor | None = None,
    ) -> Step:
        """Asks the teacher, samples classes and switches the student's head; call :meth:`end` after backward.

        Args:
            batch: inputs and labels, on the student's device.
            warming_up: compute all classes, the sampler learns meanwhile; in ``"sampled"`` mode only.
            holds_logits: the student's logits of all classes are wanted. If False and the student can be split
                before its head, a step on all classes computes its logits in blocks, in training and in evaluation,
                and ``outputs.logits`` mean nothing.
            check_values: look for labels out of range and for NaN; waits for an accelerator. None: always on a
                processor, at the first batch elsewhere.
            positions: ascending places of the items of this batch among its tokens, ``[N]``, where they are known;
                otherwise the step waits for an accelerator. With stored targets the numbers of both have to agree.

        Returns:
            the step: give ``step.inputs`` to the student and its outputs to ``step.loss``.

        Raises:
            ValueError: if labels are out of range or of a wrong shape, positions are not ascending, or the head cannot
                be switched.
            DataError: if a cache does not hold the targets of the batch.
            FloatingPointError: if the teacher returns NaN or Inf.
        """
        if check_values is None:
            on_cpu = next(iter(batch.values())).device.type == "cpu"
            check_values = on_cpu or not self._has_checked_values
        self._has_checked_values = True
        items, inputs, teacher_inputs = self._split(batch, check_values, positions)
        request = Request(items, inputs, teacher_inputs, check_values)
        if not self.student.training:
            return EvaluationStep(self, request, holds_logits)
        if self.mode == "exact":
            return ExactStep(self, request, holds_logits or not self.splits_at_head(request))
        if not self._head_is_checked:
            check_head(self.student, self.head, first_examples(inputs, items, 2), self.precision)
            self._head_is_checked = True
            if self.arguments.probe_steps and self.student_stream is not None:
                self.student_stream.splits(inputs, items)  # compared while the head is not switched
        if warming_up or self.wants_all_classes:
            make_dense(self.head.parameters())  # of steps on sampled classes before, where gradients are accumulated
            return WarmupStep(self, request, holds_logits or not self.splits_at_head(request))
        return SampledStep(self, request)

    def learn(self, sample: ClassSample, result: SampledLoss) -> GradientError | None:
        """Lets the sampler learn from a step, and its budget follow the error of the gradient.

        Args:
            sample: the classes.
            result: of the divergence at these classes.

        Returns:
            the error, if the budget measured it.
        """
        self.sampler.learn(sample, result.signal, self.reduce, result.finite)
        budget = self.sampler.budget
        if budget is None or not budget.is_due():
            return None
        error = self.gradient_error(sample, result)
        self.sampler.follow(error, self.reduce)
        if self.wants_all_classes:
            warnings.warn(  # Python shows it once
                f"gradient_error is {budget.accepted}, and a sample of {self.sampler.columns:,} of "
                f"{self.num_classes:,} classes has a larger error: all classes are computed, until a sample is "
                "expected to have a smaller error",
                RuntimeWarning,
                stacklevel=1,
            )
        return error

    @property
    def wants_all_classes(self) -> bool:
        """True while no sample keeps the accepted error of the gradient."""
        return self.sampler.budget is not None and self.sampler.budget.wants_all_classes

    @property
    def can_estimate_error(self) -> bool:
        """True if the head is one layer with its weight on this process."""
        return self.student_stream is not None and not self.is_tensor_parallel

    def gradient_error(self, sample: ClassSample, result: SampledLoss) -> GradientError:
        """The error of the gradient of some items, see :func:`hf_dis.report.gradient_error.gradient_error`.

        Args:
            sample: the classes.
            result: of the divergence at these classes.
        """
        weight, _ = self.head.weight_and_bias()
        return gradient_error(weight, sample, result, self.divergence)

    def end(self) -> None:
        """Releases the head: the student is an ordinary model again."""
        if self.head_layers:
            self.head.clear()

    @property
    def after_head(self) -> AfterHead:
        """The operations after the student's output head."""
        model = base_model(self.student)
        return AfterHead.of(model) if hasattr(model, "config") else AfterHead()

    def splits_at_head(self, request: Request) -> bool:
        """Returns True if a step can compute the student's logits in blocks; the first call compares some.

        Args:
            request: the batch.
        """
        if self._splits is None:
            stream, inputs, items = self.student_stream, request.inputs, request.items
            first = first_examples(inputs, items, 1)
            # Without a stream FSDP or DeepSpeed sharded the parameters, which are whole in the forward only.
            can_split = self.head.shard is not None or (stream is not None and stream.splits(inputs, items))
            spread = self.head.spread if can_split and self.head_layers else None
            if spread is not None:  # each process needs a shared class, and no bias beside the layer's
                can_split = spread.rows_each * (spread.number - 1) < self.num_classes and self.after_head.bias is None
            self._splits = can_split and splits_at_head(self.student, self.head, first, self.after_head)
        return self._splits

    def _split(
        self, batch: dict[str, Tensor], check_values: bool, positions: Tensor | None
    ) -> tuple[Items, dict[str, Tensor], dict[str, Tensor]]:
        """The items of a batch, and the inputs of student and teacher."""
        batch = dict(batch)
        stored = batch.pop(TARGETS, None)
        if positions is not None and check_values and bool((positions[1:] <= positions[:-1]).any()):
            raise ValueError("positions are not ascending, or hold a place twice: give positions.unique()")
        items, inputs = split_labels(self.student, self.task, batch, self.label_names, stored, positions)
        if items.labels is not None and check_values:
            check_labels(items.labels, self.num_classes)
        mine, theirs = (
            {name: value for name, value in inputs.items() if name not in columns}
            for columns in (self.teacher_columns, self.student_columns)
        )
        return items, mine, theirs

    def with_router_loss(self, loss: Tensor, terms: Losses, outputs: Any) -> tuple[Tensor, Losses]:
        """Adds the load-balancing loss of a mixture of experts, which its forward adds only to a loss of its own.

        Args:
            loss: per item, ``[N]``.
            terms: of the loss.
            outputs: of the student.

        Returns:
            the loss, and the terms with the load-balancing loss, a scalar without weight, as ``aux_loss``.
        """
        balance = getattr(outputs, "aux_loss", None)
        if balance is None:
            return loss, terms
        weight = base_model(self.student).config.get_text_config().router_aux_loss_coef
        return loss + weight * balance, {**terms, "aux_loss": balance.detach()}
