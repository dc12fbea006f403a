"""DISDistillationTrainer: a ``transformers.Trainer`` that distils while computing only the drawn classes' logits."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .cached_teacher import make_cached_sampler
from .caching import CachedTeacher, CacheMixin, check_cache, open_cache
from .checkpoints import CheckpointMixin
from .checks import check_labels, check_row_sparse, check_trainer_arguments
from .config import DISConfig
from .cost import measure_costs
from .data.teacher_cache import TARGETS, TeacherCache, stored_rows
from .diagnostics import RunningMeans, draw_quality, probe
from .distributed import average_rows, check_process_count, kept_from_ddp, of_first_process, sum_over_processes
from .evaluation import EvaluationMixin, NoRowsCheck
from .features import FeaturesMixin
from .head_search import find_head_layers, find_heads
from .heads import SampledHead, check_head, head_features
from .hub import HubMixin
from .losses import mix, sampled_cross_entropy, sampled_distillation_loss
from .optim import RowSparseAdamW
from .rows import Rows
from .sampler import ClassSampler, make_sampler
from .sparse import clip_grad_norm_
from .streaming import AfterHead, split_examples
from .tasks import base_model, find_rows, find_task, num_outputs, shared_classes, split_labels
from .teachers import OnlineTeacher, load_teacher, load_tokenizer, placed

logger = logging.get_logger(__name__)

# The draw is looked at every so many steps, and once between two logs at least: it changes slowly.
QUALITY_STEPS = 10


class DISDistillationTrainer(CacheMixin, EvaluationMixin, FeaturesMixin, CheckpointMixin, HubMixin):
    """Distils a teacher into a student by dynamic importance sampling (arXiv 1812.00914).

    Everything that ``Trainer`` does stays as it is; only the loss changes. Evaluation uses the full output layer
    and reports ``eval_loss``, ``eval_kd_loss`` and ``eval_ce_loss`` as in training, and ``eval_kl``, the KL
    divergence of student from teacher at temperature 1.

    Args:
        model: the student, or None with ``model_init``.
        teacher_model: a module that returns ``.logits``, or the name or path of a transformers checkpoint. It is put
            on the training device, frozen, and never saved.
        args: the configuration.
        teacher_cache: targets that :func:`hf_dis.cache_teacher_targets` stored of the training data, or their folder,
            to train on in place of the teacher; one that is given too only evaluates. See docs/cache.md.
        eval_teacher_cache: the same of the evaluation data, where there is no teacher.
        teacher_processing_class: the teacher's tokenizer, where the vocabularies are not of one width; compared
            with ``processing_class``, the student's. Looked for beside the checkpoint if the teacher is given by name.
        **kwargs: as for ``Trainer``.

    Raises:
        ValueError, TypeError: if the student, the teacher or an argument cannot be used; says what to do instead.
    """

    # compute_loss divides by the rows of the whole accumulation window itself.
    loss_is_scaled_for_ga = True
    _tag_names = ("hf_dis", "knowledge-distillation", "dynamic-importance-sampling")

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teacher_model: PreTrainedModel | nn.Module | str | None = None,
        args: DISConfig | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        teacher_cache: TeacherCache | str | Path | None = None,
        eval_teacher_cache: TeacherCache | str | Path | None = None,
        **kwargs: Any,
    ):
        args = DISConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DISConfig):
            raise TypeError(f"args is a {type(args).__name__}: DISDistillationTrainer needs a DISConfig")
        check_trainer_arguments(args, teacher_model, teacher_cache, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        if self.is_deepspeed_enabled:
            check_process_count()
        # A forward that takes no labels leaves this empty, and Trainer would drop the column without a word.
        self.label_names = self.label_names or ["labels"]
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would use nn.DataParallel, which copies the student past the "
                "switched head: start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        teacher = teacher_model
        if isinstance(teacher_model, str):
            teacher = load_teacher(teacher_model)
            teacher_processing_class = teacher_processing_class or load_tokenizer(teacher_model)
        if teacher is self.model:
            raise ValueError("teacher_model and model are the same module: the teacher has to be a model of its own")
        self.task = find_task(self.model)
        tokenizer = self.processing_class if isinstance(self.processing_class, PreTrainedTokenizerBase) else None
        caches = [open_cache(cache) for cache in (teacher_cache, eval_teacher_cache)]
        self.teacher_cache, self.eval_teacher_cache = caches
        width = num_outputs(self.model, self.task)
        counts = [
            check_cache(cache, self.model, width, self.task.is_lm, args.temperature, tokenizer)
            for cache in filter(None, caches)
        ]
        if teacher is not None:
            counts.append(shared_classes(self.model, teacher, tokenizer, teacher_processing_class))
        self.num_classes = counts[0]
        if any(count != counts[0] for count in counts):
            raise ValueError(f"teacher and caches are of different numbers of classes: {counts}; use those of one")
        stored_draws = None if self.teacher_cache is None else self.teacher_cache.header.layout.tail_draws
        layout = args.sampling_arguments(self.task.is_lm, stored_draws)
        self.sampler = self._make_sampler(layout)
        self.head_mode = self._choose_head_mode(layout)
        self.head_layers = self._find_head()
        self._row_sparse = self._choose_row_sparse(kwargs)
        self.online_teacher = None
        if teacher is not None:
            self.online_teacher = OnlineTeacher(
                placed(teacher, self.args.device),
                self.num_classes,
                args.temperature,
                self.sampler.rank_depth,
                context=self.accelerator.autocast,
            )
        self.teacher = self.online_teacher if self.teacher_cache is None else CachedTeacher(self.teacher_cache)
        self.add_callback(NoRowsCheck(self))
        self._means, self._quality_step = RunningMeans(), 0
        self._head_is_checked = False
        self.num_rows_seen = torch.zeros((), dtype=torch.long, device=self.args.device)
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
        """The distillation loss of a batch; in training, on drawn classes. See docs/how-it-works.md."""
        rows, inputs = self._rows(inputs)
        if self.head_mode == "exact" or not model.training:
            return self._exact_loss(model, inputs, rows, return_outputs, num_items_in_batch)
        self._check_head_once(inputs, rows)
        if self.state.global_step < self.args.get_exact_warmup_steps(self.state.max_steps):
            return self._warm_up_loss(model, inputs, rows, return_outputs, num_items_in_batch)
        draw = self.sampler.draw(self.teacher(inputs, rows, self._checks_values()), rows.labels)
        self.head.set(draw.row_ids, draw.shared_ids, rows.positions, draw.updates)  # until backward is done
        outputs = model(**inputs)
        kd, disagreement = sampled_distillation_loss(outputs.logits, draw, self.args.temperature)
        ce = None if rows.labels is None else sampled_cross_entropy(outputs.logits, draw)
        self.sampler.learn(draw, disagreement, sum_over_processes)
        self._record(kd, ce, draw, disagreement, inputs, rows)
        loss = mix(kd, ce, self.args.hard_label_weight) + self._router_loss(outputs)
        loss = self._normalise(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
            if self._row_sparse and self.accelerator.sync_gradients:
                average_rows(self.head.parameters())
            return loss
        finally:
            if self.head_mode == "sampled":
                self.head.clear()

    @property
    def head(self) -> SampledHead:
        """The student's output head; looked up each time, since ``model_init`` makes a new student."""
        return SampledHead(self.model, self.head_layers, self._row_sparse)

    # Rows, labels, normalisation

    def _rows(self, inputs: dict[str, Tensor]) -> tuple[Rows, dict[str, Tensor]]:
        """The batch's rows, with checked labels and what a cache holds of them, and the student's inputs."""
        inputs = dict(inputs)
        found = inputs.pop(TARGETS, None)
        rows, inputs = split_labels(self.model, self.task, inputs, self.label_names)
        if rows.labels is not None and self._checks_values():
            check_labels(rows.labels, self.num_classes)
        if rows.labels is None and self.args.hard_label_weight and self.model.training:
            logger.warning_once(
                f"the batches have no labels, so hard_label_weight={self.args.hard_label_weight} has no effect: where "
                "the data has some, name their column 'labels' and make them class ids (a collator drops strings)"
            )
        if found is not None:
            rows = replace(rows, targets=found[:, 0] if rows.positions is None else stored_rows(found))
        return rows, inputs

    def _checks_values(self) -> bool:
        """Whether this step looks into tensors: always on CPU; elsewhere, where it waits for the device, at the first
        step and whenever logs are due."""
        if self.args.device.type == "cpu":
            return True
        return self.state.global_step % max(1, int(self.state.logging_steps or 1)) == 0

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        found = (find_rows(self.task, batch, batch.get("labels")) for batch in batch_samples)
        num_rows = torch.tensor(sum(map(len, found)), device=device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            num_rows = self.accelerator.gather(num_rows).sum()
        self.num_rows_seen += num_rows
        return num_rows

    def _normalise(self, loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Σ loss / rows of the window, times the processes that the gradient is averaged over."""
        if num_items_in_batch is None or not self.model.training:
            return loss.sum() / max(1, len(loss))
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss.sum() / torch.as_tensor(num_items_in_batch).clamp_min(1) * processes

    # Optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if not self._row_sparse:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in ``Trainer``; with ``head_learning_rate`` the head's parameters form groups of their own."""
        mine = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if mine and self.args.head_learning_rate is not None:
            head = {id(parameter) for parameter in self.head.parameters()}
            for group in list(optimizer.param_groups):
                in_head = [parameter for parameter in group["params"] if id(parameter) in head]
                if in_head:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                    optimizer.add_param_group({**group, "params": in_head, "lr": self.args.head_learning_rate})
        return optimizer

    def _prepare_for_training(self, *args, **kwargs):
        with kept_from_ddp(self.model, self.head_layers) if self._row_sparse else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    # Logs

    def _record(self, kd, ce, draw, disagreement, inputs, rows) -> None:
        values = {"kd_loss": kd} if ce is None else {"kd_loss": kd, "ce_loss": ce}
        step = self.state.global_step
        if step % QUALITY_STEPS == 0 or step == self._quality_step or "dis/ess" not in self._means:
            self._quality_step = step  # all batches of it, where gradients are accumulated
            values |= {f"dis/{name}": value for name, value in draw_quality(draw, disagreement).items()}
        if self.args.probe_steps and self.state.global_step % self.args.probe_steps == 0:
            values |= {f"probe/{name}": value for name, value in self._probe(draw, inputs, rows).items()}
        self._means.add(values)

    def _probe(self, draw, inputs, rows) -> dict[str, Tensor]:
        features = rows.of(head_features(self.model, self.head.module, inputs))
        if features.dim() == 3:
            raise ValueError(
                f"probe_steps is {self.args.probe_steps}, but {type(self.model).__name__} picks a token after its "
                "output head: the probe needs the one vector that an example's classes follow from; set it to 0"
            )
        teacher_logits = self.online_teacher.logits(inputs, rows, check_finite=False)
        after_head = AfterHead.of(base_model(self.model))._replace(bias=None)  # it is the head's own here
        weight, bias = self.head.weight_and_bias()
        return probe(weight, bias, features, draw, teacher_logits, self.args.temperature, after_head)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: kd_loss, ce_loss, dis/*, probe/*, and the proposal's weights."""
        if "loss" in logs and self.model.training:
            logs = {**logs, **self._means.pop(sum_over_processes)}
            if self.head_mode == "sampled":
                logs |= self.sampler.proposal.scalars()
        super().log(logs, start_time)

    # Set-up

    def _choose_head_mode(self, layout: dict[str, Any]) -> str:
        args, num_classes, num_sampled = self.args, self.num_classes, layout["num_sampled_classes"]
        if num_sampled >= num_classes:
            if num_sampled > num_classes or args.head_mode == "sampled":
                logger.warning(
                    f"num_sampled_classes is {num_sampled} and there are {num_classes} classes: all of "
                    "them are computed, which is exact distillation"
                )
            return "exact"
        if args.head_mode != "auto":
            return args.head_mode
        try:
            layers = find_head_layers(self.model, num_outputs(self.model, self.task), args.head_name)
        except ValueError as error:
            if args.head_name is not None:
                raise
            logger.warning(f"head_mode='auto' chose 'exact': {error}")
            return "exact"
        num_features = self.model.get_submodule(layers[0]).in_features
        if self.teacher_cache is not None:  # the classes that are stored of a row are computed too
            drawn = self.sampler.columns - self.sampler.num_shared
            layout = {**layout, "num_sampled_classes": min(drawn, num_classes), "rank_depth": None}
        measured = {"row_sparse": args.row_sparse_head, "device": args.device, "context": self.accelerator.autocast}
        costs = of_first_process(lambda: measure_costs(num_classes, num_features, **measured, **layout))
        mode = "sampled" if costs.sampling_pays else "exact"
        logger.warning(f"head_mode='auto' chose {mode!r} for {num_classes:,} classes: {costs}")
        return mode

    def _find_head(self) -> tuple[str, ...]:
        """The layers to switch; where none is switched, the head as it is."""
        width = num_outputs(self.model, self.task)
        if self.head_mode == "sampled":
            layers = find_head_layers(self.model, width, self.args.head_name)
            if self.args.probe_steps and len(layers) > 1:
                raise ValueError(
                    f"probe_steps is {self.args.probe_steps}, but the output head is made of {' and '.join(layers)}: "
                    "the probe takes the exact gradient of one layer; set probe_steps to 0"
                )
            return layers
        try:
            return find_heads(self.model, width, self.args.head_name)
        except ValueError:
            if self.args.head_name is not None or self.args.head_learning_rate is not None:
                raise
            return ()  # all classes are computed, by whatever layers

    def _make_sampler(self, layout: dict[str, Any]) -> ClassSampler:
        seed_and_device = {"seed": self.args.seed + self.args.process_index, "device": self.args.device}
        if self.teacher_cache is None:
            return make_sampler(self.num_classes, **layout, **seed_and_device)
        layout = {**layout, "rank_depth": self.args.rank_depth}
        return make_cached_sampler(self.teacher_cache.header.layout, **layout, **seed_and_device)

    def _choose_row_sparse(self, kwargs: dict[str, Any]) -> bool:
        parameters = SampledHead(self.model, self.head_layers).parameters()
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        row_sparse = check_row_sparse(self.args, kwargs, self.model, parameters, self.head_mode, sharded)
        if self.args.row_sparse_head and not row_sparse:
            logger.warning("row_sparse_head has no effect: all classes are computed, and the head trains densely")
        if row_sparse and self.optimizer_cls_and_kwargs is None:
            _, arguments = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer_cls_and_kwargs = RowSparseAdamW, arguments
        return row_sparse

    def _check_head_once(self, inputs: dict[str, Tensor], rows: Rows) -> None:
        if not self._head_is_checked:
            narrowest = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision)
            examples = next(split_examples(inputs, rows.num_examples, 2))
            check_head(self.model, self.head, examples, narrowest)
            self._head_is_checked = True
