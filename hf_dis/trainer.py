"""DISDistillationTrainer: a ``transformers.Trainer`` that distils while computing only the drawn classes' logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash, logging

from .checkpoints import CheckpointMixin
from .checks import check_labels, check_row_sparse, check_trainer_arguments, common_num_classes
from .config import DISConfig
from .diagnostics import RunningMeans, certain_share, coverage, effective_sample_size, probe
from .distributed import average_rows, kept_from_ddp
from .head_search import find_head_layers, find_heads
from .heads import SampledHead, check_head, head_features, sampling_pays
from .hub import HubMixin
from .losses import (
    exact_cross_entropy,
    exact_distillation_loss,
    mix,
    sampled_cross_entropy,
    sampled_distillation_loss,
)
from .optim import RowSparseAdamW
from .sampler import make_sampler
from .teachers import OnlineTeacher, split_rows

logger = logging.get_logger(__name__)


class DISDistillationTrainer(CheckpointMixin, HubMixin):
    """Distils a teacher into a student by dynamic importance sampling (arXiv 1812.00914).

    Everything that ``Trainer`` does stays as it is; only the loss changes. Evaluation uses the full output layer
    and reports ``eval_loss``, ``eval_kd_loss`` and ``eval_ce_loss`` as in training, and ``eval_kl``, the KL
    divergence of student from teacher at temperature 1.

    Args:
        model: the student, or None with ``model_init``.
        teacher_model: a module that returns ``.logits``, or the name or path of a transformers checkpoint. It is put
            on the training device, frozen, and never saved.
        args: the configuration.
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
        **kwargs: Any,
    ):
        args = DISConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DISConfig):
            raise TypeError(f"args is a {type(args).__name__}: DISDistillationTrainer needs a DISConfig")
        check_trainer_arguments(args, teacher_model, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        # A forward that takes no labels leaves this empty, and Trainer would drop the column without a word.
        self.label_names = self.label_names or ["labels"]
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would use nn.DataParallel, which copies the student past the "
                "switched head: start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        teacher = load_teacher(teacher_model) if isinstance(teacher_model, str) else teacher_model
        if teacher is self.model:
            raise ValueError("teacher_model and model are the same module: the teacher has to be a model of its own")
        self.num_classes = common_num_classes(self.model, teacher)
        self.head_mode = self._choose_head_mode()
        self.head_layers = self._find_head()
        self._row_sparse = self._choose_row_sparse(kwargs)
        self.sampler = make_sampler(
            self.num_classes,
            **args.sampling_arguments(),
            seed=args.seed + args.process_index,
            device=self.args.device,
        )
        self.teacher = OnlineTeacher(
            teacher.to(self.args.device),
            self.num_classes,
            args.temperature,
            self.sampler.rank_depth,
            context=self.accelerator.autocast,
        )
        self._means = RunningMeans()
        self._eval_means = RunningMeans()
        self._head_is_checked = False
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
        labels, inputs = self._split_labels(inputs)
        if self.head_mode == "exact" or not model.training:
            return self._exact_loss(model, inputs, labels, return_outputs, num_items_in_batch)
        self._check_head_once(inputs)
        draw = self.sampler.draw(self.teacher(inputs, self._checks_values()), labels)
        self.head.set(draw.row_ids, draw.shared_ids)  # until training_step is done with backward
        outputs = model(**inputs)
        kd, disagreement = sampled_distillation_loss(outputs.logits, draw, self.args.temperature)
        ce = None if labels is None else sampled_cross_entropy(outputs.logits, draw)
        self.sampler.learn(draw, disagreement, self._sum_over_processes)
        self._record(kd, ce, draw, disagreement, inputs)
        loss = self._normalise(mix(kd, ce, self.args.hard_label_weight), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _exact_loss(self, model, inputs, labels, return_outputs, num_items_in_batch):
        outputs = model(**inputs)
        if self.args.hard_label_weight == 1 and labels is not None:
            rows = {"ce_loss": exact_cross_entropy(outputs.logits, labels)}
            loss = rows["ce_loss"]
        else:
            rows, _ = self._exact_rows(outputs.logits, inputs, labels)
            loss = mix(rows["kd_loss"], rows.get("ce_loss"), self.args.hard_label_weight)
        self._means.add(rows)
        loss = self._normalise(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _exact_rows(self, logits: Tensor, inputs: dict[str, Tensor], labels: Tensor | None):
        """Exact kd_loss and, with labels, ce_loss of each row from full logits ``[N, C]``; the teacher's logits."""
        teacher_logits = torch.cat(list(self.teacher.logits(inputs, self._checks_values())))
        rows = {"kd_loss": exact_distillation_loss(logits, teacher_logits, self.args.temperature)}
        if labels is not None:
            rows["ce_loss"] = exact_cross_entropy(logits, labels)
        return rows, teacher_logits

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

    def _split_labels(self, inputs: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Takes the labels out, so that the student computes no loss of its own, and checks their range."""
        labels = inputs.get("labels")
        inputs = {name: value for name, value in inputs.items() if name not in self.label_names}
        if labels is not None:
            if labels.dim() != 1:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}: this version distils classifiers with one class id a "
                    "row, [N]"
                )
            if self._checks_values():
                check_labels(labels, self.num_classes)
        return labels, inputs

    def _checks_values(self) -> bool:
        """Whether this step looks into tensors: always on CPU; elsewhere, where it waits for the device, at the first
        step and whenever logs are due."""
        if self.args.device.type == "cpu":
            return True
        return self.state.global_step % max(1, int(self.state.logging_steps or 1)) == 0

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        num_rows = torch.tensor(sum(_num_rows(batch) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_rows = self.accelerator.gather(num_rows).sum()
        return num_rows

    def _normalise(self, loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Σ loss / rows of the window, times the processes that the gradient is averaged over."""
        if num_items_in_batch is None or not self.model.training:
            return loss.mean()
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss.sum() / num_items_in_batch * processes

    def _sum_over_processes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.accelerator.reduce(tensors, reduction="sum")

    # Optimizer

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

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One evaluation batch on the full head; the losses of its rows are kept for :meth:`evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        labels, inputs = self._split_labels(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
            rows, teacher_logits = self._exact_rows(outputs.logits, inputs, labels)
            rows["kl"] = exact_distillation_loss(outputs.logits, teacher_logits, 1.0)
        rows["loss"] = loss = mix(rows["kd_loss"], rows.get("ce_loss"), self.args.hard_label_weight)
        self._eval_means.add(self.accelerator.gather_for_metrics(rows))
        if prediction_loss_only:
            return loss.mean(), None, None
        ignored = ["loss", *(ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", []))]
        kept = tuple(value.detach() for name, value in outputs.items() if name not in ignored)
        return loss.mean(), kept[0] if len(kept) == 1 else kept, labels

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._eval_means.pop()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_means.pop()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    # Logs

    def _record(self, kd, ce, draw, disagreement, inputs) -> None:
        values = {
            "kd_loss": kd,
            "dis/ess": effective_sample_size(draw, disagreement),
            "dis/coverage": coverage(draw),
            "dis/certain": certain_share(draw),
        }
        if ce is not None:
            values["ce_loss"] = ce
        if self.args.probe_steps and self.state.global_step % self.args.probe_steps == 0:
            values |= {f"probe/{name}": value for name, value in self._probe(draw, inputs).items()}
        self._means.add(values)

    def _probe(self, draw, inputs) -> dict[str, Tensor]:
        features = head_features(self.model, self.head.module, inputs)
        teacher_logits = self.teacher.logits(inputs, check_finite=False)
        return probe(self.head.module, features, draw, teacher_logits, self.args.temperature)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log: kd_loss, ce_loss, dis/*, probe/*, and the proposal's weights."""
        if "loss" in logs and self.model.training:
            logs = {**logs, **self._means.pop(self._sum_over_processes)}
            if self.head_mode == "sampled":
                logs |= self.sampler.proposal.scalars()
        super().log(logs, start_time)

    # Set-up

    def _choose_head_mode(self) -> str:
        args, num_classes = self.args, self.num_classes
        if args.num_sampled_classes >= num_classes:
            if args.num_sampled_classes > num_classes or args.head_mode == "sampled":
                logger.warning(
                    f"num_sampled_classes is {args.num_sampled_classes} and there are {num_classes} classes: all of "
                    "them are computed, which is exact distillation"
                )
            return "exact"
        if args.head_mode != "auto":
            return args.head_mode
        pays, why = sampling_pays(num_classes, args.num_sampled_classes, args.num_shared_classes)
        logger.warning(f"head_mode='auto' chose {'sampled' if pays else 'exact'!r}: {why}")
        return "sampled" if pays else "exact"

    def _find_head(self) -> tuple[str, ...]:
        """The layers to switch; where none is switched, the head, if an argument is about it."""
        if self.head_mode == "sampled":
            layers = find_head_layers(self.model, self.num_classes, self.args.head_name)
            if self.args.probe_steps and len(layers) > 1:
                raise ValueError(
                    f"probe_steps is {self.args.probe_steps}, but the output head is made of {' and '.join(layers)}: "
                    "the probe takes the exact gradient of one layer; set probe_steps to 0"
                )
            return layers
        if self.args.head_name is not None or self.args.head_learning_rate is not None:
            return find_heads(self.model, self.num_classes, self.args.head_name)
        return ()

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

    def _check_head_once(self, inputs: dict[str, Tensor]) -> None:
        if not self._head_is_checked:
            narrowest = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision)
            check_head(self.model, self.head, next(split_rows(inputs, 2)), narrowest)
            self._head_is_checked = True


def load_teacher(name_or_path: str) -> PreTrainedModel:
    """Loads a teacher as the class that its checkpoint names.

    Args:
        name_or_path: of a transformers checkpoint.

    Raises:
        ValueError: if the checkpoint does not name a class of transformers.
    """
    architectures = AutoConfig.from_pretrained(name_or_path).architectures or ["none"]
    teacher_class = getattr(transformers, architectures[0], None)
    if teacher_class is None:
        raise ValueError(
            f"the checkpoint {name_or_path} names the architecture {architectures[0]}, which transformers does not "
            "have: load the teacher yourself and pass the model"
        )
    teacher = teacher_class.from_pretrained(name_or_path)
    # For the model card: from_pretrained itself does not keep the commit.
    teacher.config._commit_hash = extract_commit_hash(cached_file(name_or_path, CONFIG_NAME), None)
    return teacher


def _num_rows(batch: dict[str, Tensor]) -> int:
    return len(batch["labels"] if "labels" in batch else next(iter(batch.values())))
