"""DISTrainerMixin: the hooks by which a ``transformers.Trainer``, or any subclass of it, trains with a Distiller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from hf_dis.build import build_distiller
from hf_dis.cache.attach import check_data, open_cache
from hf_dis.cache.reader import TeacherCache
from hf_dis.distiller import Distiller
from hf_dis.distributed.sums import average_rows, sum_over_processes
from hf_dis.head.switch import SampledHead
from hf_dis.loss.objective import Losses
from hf_dis.models.columns import forward_columns
from hf_dis.report.diagnostics import RunningMeans
from hf_dis.report.gradient_error import GradientError
from hf_dis.steps import EvaluationStep, Step
from hf_dis.teacher.loading import open_teacher
from hf_dis.trainer.callbacks import NoItemsCheck, OpeningLine
from hf_dis.trainer.checks import (
    check_config,
    check_optimizer,
    check_processes,
    check_sharded_student,
    check_trainer_arguments,
    makes_row_optimizer,
)
from hf_dis.trainer.evaluation import Evaluation, gather_examples
from hf_dis.trainer.expected import expected_items
from hf_dis.trainer.features import extract_features
from hf_dis.trainer.optimizer import OptimizerHooks
from hf_dis.trainer.positions import KnownPositions, with_positions
from hf_dis.trainer.progress import FirstStep, timed_items
from hf_dis.trainer.saving import SavingHooks

logger = logging.get_logger(__name__)

# The quality of the sample changes slowly: it is measured at one of this number of steps, and once between two logs.
QUALITY_STEPS = 10


class DISTrainerMixin(SavingHooks, OptimizerHooks):
    """Trains any ``transformers.Trainer`` with a :class:`hf_dis.Distiller`; put the mixin before the host's class.

    Everything that the host does stays as it is; only the loss changes. Evaluation computes all classes and reports
    ``eval_loss``, ``eval_kd_loss``, ``eval_ce_loss``, and ``eval_kl``, the KL divergence of the student from the
    teacher at temperature 1.

    Args:
        model: the student, or None with ``model_init``.
        teacher_model: a module that returns ``.logits``, or the name or path of a transformers checkpoint. The
            teacher is put on the training device, frozen, and never saved.
        args: the configuration, an instance of :attr:`config_class`.
        teacher_processing_class: the teacher's tokenizer, needed where the vocabularies have different widths. A
            teacher given by name brings its own tokenizer.
        teacher_cache: targets that :func:`hf_dis.cache_teacher_targets` stored of the training data, or their folder,
            to train on in place of the teacher. A teacher that is given too only evaluates. See docs/cache.md.
        eval_teacher_cache: stored targets of the evaluation data, or their folder, where there is no teacher.
        **kwargs: as for the host.

    Attributes:
        distiller: the engine. A training or an evaluation outside training makes it again if ``model_init`` made
            another student, or the settings of the method in ``args`` have changed.

    Raises:
        ValueError, TypeError: if student, teacher or an argument cannot be used; names value, expectation and remedy.
    """

    # compute_loss itself divides by the number of items in the accumulation window.
    loss_is_scaled_for_ga = True
    config_class: type[TrainingArguments]

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: Any = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        teacher_cache: TeacherCache | str | Path | None = None,
        eval_teacher_cache: TeacherCache | str | Path | None = None,
        **kwargs: Any,
    ):
        args = self.config_class(output_dir="tmp_trainer") if args is None else args
        check_config(type(self), args)
        check_trainer_arguments(args, teacher_model, teacher_cache, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        check_processes(self)
        self._teacher = open_teacher(teacher_model, teacher_processing_class)
        self.teacher_cache, self.eval_teacher_cache = map(open_cache, (teacher_cache, eval_teacher_cache))
        # A forward without labels leaves label_names empty, and Trainer would drop the labels column silently.
        self.label_names = self.label_names or ["labels"]
        self.distiller = self._make_distiller()
        check_optimizer(self)
        check_sharded_student(self)
        for callback in (NoItemsCheck(self), OpeningLine(self), FirstStep()):
            self.add_callback(callback)
        self._means, self._evaluation = RunningMeans(), Evaluation(holds_logits=True)
        self._quality_step, self._in_training_step, self._positions = 0, False, KnownPositions()
        self.num_items_seen = torch.zeros((), dtype=torch.long, device=self.args.device)
        if isinstance(self.model, PreTrainedModel):
            self.model.add_model_tags(list(self._tag_names))

    # The step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The distillation loss of a batch: on sampled classes in training, on all classes in evaluation."""
        try:
            # The teacher answers, classes are sampled, the head is switched.
            step = self._begin(inputs, return_outputs)
            outputs = model(**step.inputs)  # the student computes the sampled logits only
            losses, terms = step.loss(outputs)  # per item, [N]; the sampler learns from the signal
        finally:
            if not self._in_training_step:  # training_step releases the head after backward
                self.distiller.end()
        self._record(step, losses, terms)
        loss = self._normalise(losses, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the host's, and releases the head after backward."""
        self._in_training_step = True
        try:
            loss = super().training_step(*args, **kwargs)
            if self.distiller.row_sparse and self.accelerator.sync_gradients:
                self._set_gain(is_exact=self._is_warming_up or self.distiller.wants_all_classes)
                average_rows(self.head.parameters(), over_processes=self.head.shard is None)
            return loss
        finally:
            self._in_training_step = False
            self.distiller.end()

    def _begin(self, inputs: dict[str, Tensor], returns_outputs: bool) -> Step:
        settings = self.distiller.arguments
        if settings.hard_label_weight and self.model.training and inputs.get("labels") is None:
            logger.warning_once(
                f"the batches have no labels, so hard_label_weight={settings.hard_label_weight} has no effect: if the "
                "data has labels, name their column 'labels' and make them class ids (a collator drops strings)"
            )
        return self.distiller.begin(
            inputs,
            warming_up=self._is_warming_up,
            holds_logits=returns_outputs if self.model.training else self._evaluation.holds_logits,
            check_values=self._checks_values(),
            positions=self._positions.of(inputs),
        )

    @property
    def _is_warming_up(self) -> bool:
        return self.state.global_step < self.distiller.arguments.get_exact_warmup_steps(self.state.max_steps)

    def _checks_values(self) -> bool:
        """Returns True on a processor; on an accelerator, where checks wait for it, at steps whose logs are due."""
        if self.args.device.type == "cpu":
            return True
        return self.state.global_step % max(1, int(self.state.logging_steps or 1)) == 0

    def _normalise(self, losses: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Σ loss / items of the window, times the number of processes that the gradient is averaged over."""
        if num_items_in_batch is None or not self.model.training:
            return losses.sum() / max(1, len(losses))
        copies = self._num_copies if self.args.average_tokens_across_devices else 1
        return losses.sum() / torch.as_tensor(num_items_in_batch).clamp_min(1) * copies

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        self._positions = KnownPositions(batch_samples)
        counts = (self.distiller.count(batch, self._positions.of(batch)) for batch in batch_samples)
        num_items = torch.tensor(sum(counts), device=device)
        if self.args.average_tokens_across_devices and self._num_copies > 1:
            num_items = self.accelerator.gather(num_items).sum() // self.get_tp_size()
        self.num_items_seen += num_items
        return num_items

    # The engine

    @property
    def _num_copies(self) -> int:
        """The copies of the student; the processes that hold one of a tensor-parallel student have the same items."""
        return self.accelerator.num_processes // self.get_tp_size()

    @property
    def head(self) -> SampledHead:
        """The student's output head."""
        return self.distiller.head

    @property
    def _student(self) -> nn.Module:
        """The student without the wrapper that FSDP puts into ``model``."""
        return self.accelerator.unwrap_model(self.model)

    def _make_distiller(self) -> Distiller:
        tokenizer = self.processing_class if isinstance(self.processing_class, PreTrainedTokenizerBase) else None
        return build_distiller(
            self._student,
            self._teacher[0],
            self.args,
            tokenizer=tokenizer,
            teacher_tokenizer=self._teacher[1],
            teacher_cache=self.teacher_cache,
            eval_teacher_cache=self.eval_teacher_cache,
            device=self.args.device,
            seed=self.args.seed,
            context=self.accelerator.autocast,
            precision={"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision),
            label_names=self.label_names,
            is_sharded="fsdp2" if self.accelerator.is_fsdp2 else self.is_fsdp_enabled or self.is_deepspeed_enabled,
            num_items=timed_items(self),
            steps_rows=makes_row_optimizer(self),
        )

    def _expected_items(self) -> int | None:
        """The number of items that a batch of one process is expected to have; None where it is not known."""
        return expected_items(self)

    def _refresh_distiller(self) -> None:
        """Makes the engine again for a new student or changed settings, so that trials share nothing."""
        changed = self.distiller.arguments != self.args.settings()
        if changed or self.distiller.student is not self._student:
            self.distiller = self._make_distiller()
            check_optimizer(self)

    def _set_signature_columns_if_needed(self) -> None:
        """As the host's, and keeps the columns that only the teacher takes; the engine gives each model its own."""
        super()._set_signature_columns_if_needed()
        if self._teacher[0] is not None:
            extra = forward_columns(self._teacher[0]).difference(self._signature_columns)
            self._signature_columns = [*self._signature_columns, *sorted(extra)]

    def _get_dataloader(self, dataset: Dataset, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        cache = {"Training": self.teacher_cache, "Evaluation": self.eval_teacher_cache}.get(description)
        own, collate = self.data_collator, self.data_collator if cache is None else cache.collator(self.data_collator)
        given = self.distiller.task, dataset, self.args
        self.data_collator = with_positions(collate, *given) if description == "Training" else collate
        try:
            loader = super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = own
        if cache is not None:
            check_data(loader, self.args.seed)
        return loader

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._refresh_distiller()
        self._means, self._quality_step = RunningMeans(), 0
        self.num_items_seen.zero_()
        with self._rows_kept_from_ddp():
            return super()._prepare_for_training(*args, **kwargs)

    # Logs

    def _record(self, step: Step, losses: Tensor, terms: Losses) -> None:
        if isinstance(step, EvaluationStep):
            self._evaluation.add(step.items, losses, terms)
            return
        number, values, probe_steps = self.state.global_step, dict(terms), self.distiller.arguments.probe_steps
        if number % QUALITY_STEPS == 0 or number == self._quality_step or "dis/ess" not in self._means:
            self._quality_step = number  # every batch of this step is measured where gradients are accumulated
            values |= self._quality(step)
        if probe_steps and number % probe_steps == 0:
            values |= {f"probe/{name}": value for name, value in step.probe().items()}
        self._means.add(values)

    def _quality(self, step: Step) -> dict[str, Tensor | GradientError]:
        """The logs of a step's sample, per item."""
        return {f"dis/{name}": value for name, value in step.quality().items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: kd_loss, ce_loss, dis/*, probe/*, and the proposal's weights."""
        if "loss" in logs and self.model.training:
            logs = {**logs, **self._means.pop(sum_over_processes)}
            if self.distiller.mode == "sampled":
                logs |= self.distiller.sampler.scalars()
        super().log(logs, start_time)

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """One evaluation batch on all classes, through :meth:`compute_loss`, an override included."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach()
        self._evaluation.close_batch(loss, self.gather_examples)
        if prediction_loss_only:
            return loss, None, None
        ignored = ["loss", *(ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", []))]
        kept = tuple(value.detach() for name, value in outputs.items() if name not in ignored)
        return loss, kept[0] if len(kept) == 1 else kept, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the host's, with the means of the losses over items among the metrics.

        The student's logits are held as a whole only if predictions are returned, or a subclass overrides
        :meth:`compute_loss`, which may read the logits.
        """
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        if not self.is_in_train:
            self._refresh_distiller()
        if self.distiller.is_tensor_parallel:
            self.gather_function = self.gather_examples
        is_overridden = type(self).compute_loss is not DISTrainerMixin.compute_loss
        self._evaluation = Evaluation(holds_logits=is_overridden or not prediction_loss_only)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            means = self._evaluation.means()
        finally:
            self._evaluation = Evaluation(holds_logits=True)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def gather_examples(self, values: Any) -> Any:
        """Gathers values per example over processes, without the examples that only fill up the last batch."""
        return gather_examples(self.accelerator, self.distiller.replicas, values)

    def extract_features(self, dataset: Any) -> Tensor:
        """The features that the student's head is given; see :func:`hf_dis.trainer.features.extract_features`."""
        if not self.is_in_train:
            self._refresh_distiller()
        return extract_features(self, dataset)
