"""Evaluation: exact losses and the divergence from the teacher, averaged over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .diagnostics import RunningMeans
from .exact import ExactMixin
from .losses import mix
from .rows import Rows

if TYPE_CHECKING:
    from .trainer import DISDistillationTrainer


class EvaluationMixin(ExactMixin):
    """How a distilling trainer evaluates, whatever the task."""

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
