"""Evaluation on the full head: exact losses and the divergence from the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .cached_teacher import CachedTargets
from .caching import check_targets, unpack_targets
from .compact import CompactTargets
from .diagnostics import RunningMeans
from .losses import exact_cross_entropy, exact_distillation_loss, mix, sparse_distillation_loss
from .rows import Rows
from .streaming import CHUNK_ELEMENTS

if TYPE_CHECKING:
    from .data.teacher_cache import TeacherCache
    from .teachers import OnlineTeacher
    from .trainer import DISDistillationTrainer


class EvaluationMixin(Trainer):
    """How a distilling trainer evaluates, whatever the task."""

    online_teacher: OnlineTeacher | None
    teacher_cache: TeacherCache | None
    eval_teacher_cache: TeacherCache | None
    num_classes: int

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """One evaluation batch on the full head; the losses of its rows are kept for :meth:`evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        rows, inputs = self._rows(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
            losses = self._exact_losses(outputs.logits, inputs, rows, with_kl=True)
        if not losses:
            raise ValueError(
                "there is nothing to evaluate: the data has no labels, and there is no teacher for it. Pass "
                "teacher_model, or eval_teacher_cache, beside teacher_cache"
            )
        ce = losses.get("ce_loss")
        losses["loss"] = mix(losses["kd_loss"], ce, self.args.hard_label_weight) if "kd_loss" in losses else ce
        self._keep(losses, rows)
        loss = losses["loss"].sum() / max(1, len(rows))
        if prediction_loss_only:
            return loss, None, None
        ignored = ["loss", *(ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", []))]
        kept = tuple(value.detach() for name, value in outputs.items() if name not in ignored)
        return loss, kept[0] if len(kept) == 1 else kept, labels

    def _keep(self, losses: dict[str, Tensor], rows: Rows) -> None:
        # By example, of which all processes have as many: so that those that fill up the last batch are left out.
        sums = {name: rows.sums_by_example(value.double()) for name, value in losses.items()}
        sums["rows"] = rows.sums_by_example(torch.ones_like(losses["loss"], dtype=torch.double))
        sums = self.accelerator.gather_for_metrics(sums)
        self._eval_means.add(sums, counts=sums.pop("rows"))

    def _exact_losses(
        self, logits: Tensor, inputs: dict[str, Tensor], rows: Rows, with_kl: bool = False
    ) -> dict[str, Tensor]:
        """Losses of each row, ``[N]``, from the student's full logits ``[B, C]`` or ``[B, S, C]``: kd_loss, ce_loss if
        there are labels, and the KL divergence from the teacher at temperature 1 if it is asked for. Copies of the
        logits exist chunk by chunk."""
        if rows.targets is None and self.online_teacher is not None:
            chunks = self._online_losses(logits, inputs, rows, with_kl)
        else:
            chunks = self._stored_losses(logits, rows, with_kl)
        parts = list(chunks)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _online_losses(
        self, logits: Tensor, inputs: dict[str, Tensor], rows: Rows, with_kl: bool
    ) -> Iterator[dict[str, Tensor]]:
        first_row = 0
        for teacher_logits in self.online_teacher.logits(inputs, rows, self._checks_values()):
            chunk = slice(first_row, first_row + len(teacher_logits))
            part = rows.of(logits, chunk)[:, : self.num_classes]
            losses = {"kd_loss": exact_distillation_loss(part, teacher_logits, self.args.temperature)}
            if with_kl:
                losses["kl"] = exact_distillation_loss(part, teacher_logits, 1.0)
            yield losses | self._label_loss(part, rows, chunk)
            first_row = chunk.stop
            del teacher_logits

    def _stored_losses(self, logits: Tensor, rows: Rows, with_kl: bool) -> Iterator[dict[str, Tensor]]:
        """kd_loss is an estimate here, and the divergence known if 1 is the temperature; without targets neither."""
        cache = self.teacher_cache if self.model.training else self.eval_teacher_cache
        if rows.targets is not None:
            check_targets(rows)
        chunk_rows = max(1, CHUNK_ELEMENTS // self.num_classes)
        for first_row in range(0, max(1, len(rows)), chunk_rows):
            chunk, losses = slice(first_row, first_row + chunk_rows), {}
            part = rows.of(logits, chunk)[:, : self.num_classes]
            if rows.targets is not None:
                stored = unpack_targets(cache.header, rows.targets[chunk], self._checks_values())
                losses["kd_loss"] = self._stored_loss(part, stored)
                if with_kl and self.args.temperature == 1:
                    losses["kl"] = losses["kd_loss"]
            yield losses | self._label_loss(part, rows, chunk)

    def _stored_loss(self, logits: Tensor, compact: CompactTargets) -> Tensor:
        targets = CachedTargets(compact, self.num_classes)
        return sparse_distillation_loss(logits, targets.ids, targets.log_probs, targets.target, self.args.temperature)

    def _label_loss(self, logits: Tensor, rows: Rows, chunk: slice) -> dict[str, Tensor]:
        return {} if rows.labels is None else {"ce_loss": exact_cross_entropy(logits, rows.labels[chunk])}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._eval_means = RunningMeans()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_means.pop()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output


class NoRowsCheck(TrainerCallback):
    """Stops a training that has nothing to learn from."""

    def __init__(self, trainer: DISDistillationTrainer):
        self.trainer = trainer

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.trainer.num_rows_seen:
            raise ValueError(
                "no token of the training data is supervised: all labels are -100 (that of the first token does not "
                "count in a causal language model); look at the data collator and at what masks the labels"
            )
