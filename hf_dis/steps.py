"""The steps of a Distiller: on sampled classes, on all classes, and for evaluation.

A step is made from a batch after the teacher was chosen; ``step.inputs`` go to the student, and its outputs to
``step.loss``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_dis.distributed.exact_head import ShardedHeadLoss
from hf_dis.distributed.exact_rows import SpreadHeadLoss
from hf_dis.head.sampled_linear import sampled_columns, sampled_logits
from hf_dis.head.tensor_parallel import check_same_sample
from hf_dis.items import Items
from hf_dis.loss.divergence import SampledLoss, mix
from hf_dis.loss.exact import ExactTerms, LogitsLoss, exact_losses
from hf_dis.loss.exact_head import HeadInput, HeadLoss
from hf_dis.loss.objective import Losses, Objective
from hf_dis.loss.sampled import sampled_loss
from hf_dis.models.head_features import head_features
from hf_dis.report.diagnostics import probe, sample_quality
from hf_dis.report.gradient_error import GradientError
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.online import check_asked_alone
from hf_dis.teacher.targets import TeacherTargets, chunk_items

if TYPE_CHECKING:
    from hf_dis.distiller import Distiller


class Request(NamedTuple):
    """Inputs and settings that a step is made from.

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
        holds_logits: compute the student's logits as a whole. If False its head keeps its input, from which the loss
            computes the logits in blocks.

    Attributes:
        inputs: what the student is to be given.
        items: of the batch.
    """

    def __init__(self, distiller: Distiller, request: Request, holds_logits: bool):
        self.distiller, self.items, self.inputs = distiller, request.items, request.inputs
        self.request, self._held = request, None
        self._at_positions = bool(distiller.head_layers) and request.items.positions is not None
        if not holds_logits:
            self._held = distiller.head.hold_in_training(request.items)
        elif self._at_positions:
            distiller.head.set_positions(request.items)

    def loss(self, outputs: Any) -> tuple[Tensor, Losses]:
        """The loss of every item ``[N]``, and its terms ``kd_loss`` and ``ce_loss`` ``[N]`` without gradient.

        A mixture of experts adds its load-balancing loss, the scalar term ``aux_loss``.
        """
        exact = self._exact(outputs)
        exact.add_all(self._teacher())
        return self.distiller.with_router_loss(*exact.result(), outputs)

    def quality(self) -> dict[str, Tensor | GradientError]:
        """Returns no values: nothing was sampled."""
        return {}

    def probe(self) -> dict[str, Tensor]:
        """Returns no values: the loss and its gradient are exact."""
        return {}

    def _teacher(self, alone: bool = False) -> Iterator[Tensor | CachedTargets] | None:
        """The teacher's targets on all classes; None where only the labels count.

        Args:
            alone: other processes may not ask.
        """
        distiller, request = self.distiller, self.request
        if distiller.arguments.hard_label_weight == 1 and self.items.labels is not None:
            return None
        if alone:
            check_asked_alone(distiller.teacher)
        return distiller.teacher.all_classes(request.teacher_inputs, self.items, request.check_values)

    def _exact(self, outputs: Any) -> LogitsLoss | HeadLoss:
        """The loss on all classes, to which the teacher's targets are to be added."""
        distiller, settings = self.distiller, self.distiller.arguments
        objective = Objective(
            distiller.num_classes,
            self.items.labels,
            settings.temperature,
            settings.hard_label_weight,
            distiller.divergence,
        )
        self._head_input = _head_input(distiller, self._held)
        if self._head_input is None:
            return LogitsLoss(self._logits(outputs), objective)
        again = partial(self._teacher, alone=True)  # in backward, where the items of a process may count differently
        if distiller.is_tensor_parallel and (spread := distiller.head.spread) is not None:
            given = self._head_input._replace(features=spread.copied(self._head_input.features))
            return SpreadHeadLoss(given, spread, objective, again)
        if distiller.head.shard is None:
            return HeadLoss(self._head_input, objective, again)
        return ShardedHeadLoss(self._head_input, distiller.head.module, objective, again)

    def _logits(self, outputs: Any) -> Tensor:
        """The logits of the items, ``[N, V]``."""
        # A head that is also the model's embedding is not switched: its logits are [B, S, V].
        is_switched = self._at_positions and outputs.logits.dim() == 2
        return outputs.logits if is_switched else self.items.of(outputs.logits)


class WarmupStep(ExactStep):
    """A training step on all classes in which the sampler learns from the classes that it would have sampled."""

    def loss(self, outputs: Any) -> tuple[Tensor, Losses]:
        """As :meth:`ExactStep.loss`."""
        distiller, request = self.distiller, self.request
        exact = self._exact(outputs)
        targets = distiller.teacher(request.teacher_inputs, self.items, request.check_values)
        if isinstance(exact, ShardedHeadLoss):  # the processes go through all items together
            exact.add_all(distiller.teacher.all_classes(request.teacher_inputs, self.items, request.check_values))
        else:
            targets = _added(exact, targets)
        self.sample = distiller.sampler.sample(targets, self.items.labels)
        logits = self._sampled_logits(outputs)
        self.result = distiller.divergence.sampled(logits, self.sample, distiller.arguments.temperature)
        self.error = distiller.learn(self.sample, self.result)
        return distiller.with_router_loss(*exact.result(), outputs)

    @torch.no_grad()
    def _sampled_logits(self, outputs: Any) -> Tensor:
        """The student's logits at the sampled classes, ``[N, R + K_t]``."""
        head, ids = self._head_input, (self.sample.item_ids, self.sample.tail_ids)
        if head is None:
            return sampled_columns(self._logits(outputs).detach(), *ids)
        if self.distiller.head.shard is not None:
            return head.after_head(self.distiller.head.module.sampled(head.features.to(head.dtype), *ids))
        given = head.features.to(head.dtype), head.weight, head.bias
        return head.after_head(sampled_logits(*given, *ids, shard=self.distiller.head.spread))

    def quality(self) -> dict[str, Tensor | GradientError]:
        """As :meth:`SampledStep.quality`."""
        return _quality(self.distiller, self.sample, self.result, self.error)

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
        if distiller.is_tensor_parallel and request.check_values:
            check_same_sample(sample.item_ids, sample.tail_ids, distiller.replicas.group)
        distiller.head.set(sample.item_ids, sample.tail_ids, self.items.positions, sample.updates)

    def loss(self, outputs: Any) -> tuple[Tensor, Losses]:
        """The loss of every item ``[N]``, and its terms as :meth:`ExactStep.loss` returns them.

        The sampler learns from the signal of the step.

        Args:
            outputs: of the student for ``inputs``; its logits are ``[N, R + K_t]``.
        """
        distiller, settings = self.distiller, self.distiller.arguments
        loss, terms, self.result = sampled_loss(
            outputs.logits, self.sample, settings.temperature, settings.hard_label_weight, distiller.divergence
        )
        self.error = distiller.learn(self.sample, self.result)
        return distiller.with_router_loss(loss, terms, outputs)

    def quality(self) -> dict[str, Tensor | GradientError]:
        """Effective sample size, coverage and share of certain classes of every item, ``[N]``; after :meth:`loss`.

        Where the head is one layer with its weight on this process, ``gradient_error`` is that of some items,
        estimated from the sample. A truncation has none, since its sample never holds the dropped classes.
        """
        return _quality(self.distiller, self.sample, self.result, self.error)

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
        if not holds_logits and distiller.head.shard is not None and distiller.splits_at_head(request):
            self._held = distiller.head.hold_in_training(request.items)
        elif not holds_logits and stream is not None and stream.splits(request.inputs, request.items):
            self._held = distiller.head.hold(request.items)

    def loss(self, outputs: Any) -> tuple[Tensor, Losses]:
        """The loss of every item ``[N]``, and its terms as :func:`hf_dis.loss.exact.exact_losses` returns them.

        Raises:
            ValueError: if there are neither labels nor a teacher.
        """
        distiller, settings = self.distiller, self.distiller.arguments
        given = distiller.num_classes, self.items.labels, settings.temperature
        if distiller.head.shard is not None and _head_input(distiller, self._held) is not None:
            terms = self._sharded_terms(Objective(*given, divergence=distiller.divergence))
        else:
            student, block_items = self._student(outputs)
            terms = exact_losses(
                student,
                len(self.items),
                block_items,
                given[0],
                self._teacher(),
                *given[1:],
                with_kl=True,
                divergence=distiller.divergence,
            )
        if not terms:
            raise ValueError(
                "there is nothing to evaluate: the data has no labels, and there is no teacher for it. Pass "
                "teacher_model, or eval_teacher_cache, beside teacher_cache"
            )
        ce = terms.get("ce_loss")
        return (mix(terms["kd_loss"], ce, settings.hard_label_weight) if "kd_loss" in terms else ce), terms

    @torch.no_grad()
    def _sharded_terms(self, objective: Objective) -> Losses:
        """The terms of a student whose head is sharded."""
        head = _head_input(self.distiller, self._held)
        exact = ShardedHeadLoss(head, self.distiller.head.module, objective, self._teacher, with_kl=True)
        exact.add_all(self._teacher())
        return exact.terms()

    def _student(self, outputs: Any) -> tuple[Callable[[slice], Tensor], int]:
        """The student's logits of a slice of items, and the items of a slice."""
        num_items = len(self.items)
        if self._held is None:
            logits = outputs.logits
            size = chunk_items(num_items, logits.shape[-1], logits.device)
            return lambda chunk: self.items.of(logits, chunk), size
        if self._held.features is None:  # the head computed the items alone
            return outputs.logits.__getitem__, chunk_items(num_items, outputs.logits.shape[1], outputs.logits.device)
        self.distiller.end()  # the head is applied to chunks of what it was given
        stream, features = self.distiller.student_stream, self._held.features
        return lambda chunk: stream.of_features(features[chunk]), stream.items_of_chunk(num_items, features.device)

    def _teacher(self) -> Iterator[Tensor | CachedTargets] | None:
        distiller, request = self.distiller, self.request
        stored = distiller.eval_teacher or distiller.teacher
        teacher = distiller.online_teacher if self.items.targets is None else stored
        return teacher and teacher.all_classes(request.teacher_inputs, self.items, request.check_values)


def _head_input(distiller: Distiller, held: Any) -> HeadInput | None:
    """The head and its input, where the head kept it; it keeps none in float16."""
    if held is None or held.features is None:
        return None
    weight, bias = distiller.head.weight_and_bias()
    return HeadInput(held.features, weight, bias, held.dtype, distiller.after_head._replace(bias=None))


def _added(exact: ExactTerms, targets: Iterable[TeacherTargets | CachedTargets]) -> Iterator[Any]:
    """Passes a teacher's targets on, chunk by chunk, each after the loss on all classes had it."""
    for chunk in targets:
        exact.add(chunk.all_classes())
        yield chunk
        del chunk  # the next chunk is computed without this one in memory


Step = SampledStep | WarmupStep | ExactStep | EvaluationStep


def _quality(
    distiller: Distiller, sample: ClassSample, result: SampledLoss, error: GradientError | None
) -> dict[str, Tensor | GradientError]:
    quality: dict[str, Tensor | GradientError] = sample_quality(sample, result)
    if distiller.can_estimate_error and distiller.arguments.proposal != "topk":
        quality["gradient_error"] = distiller.gradient_error(sample, result) if error is None else error
    return quality


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
    temperature, after_head = distiller.arguments.temperature, stream.after_head._replace(bias=None)
    return probe(weight, bias, features, sample, teacher, temperature, after_head, distiller.divergence)
