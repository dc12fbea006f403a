"""Callbacks of every training: a line at the start on what will run, and the end of a training without items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_dis.autotune import TOKENS
from hf_dis.distiller import Distiller
from hf_dis.estimate import A100, estimate_head
from hf_dis.kernels import uses_triton
from hf_dis.report.callback import DISReportCallback
from hf_dis.report.records import FOLDER, PAGE
from hf_dis.trainer.progress import tell

if TYPE_CHECKING:
    from hf_dis.trainer.mixin import DISTrainerMixin


class NoItemsCheck(TrainerCallback):
    """Ends a training that has no supervised item."""

    def __init__(self, trainer: DISTrainerMixin):
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError if no item has been supervised since the training began."""
        if not self.trainer.num_items_seen:
            raise ValueError(
                "no token of the training data is supervised: all labels are -100 (the label of the first token does "
                "not count in a causal language model). Check the data collator, and the code that masks the labels"
            )


class OpeningLine(TrainerCallback):
    """Logs one line at the start of a training about what will run; see :func:`hf_dis.trainer.progress.tell`."""

    def __init__(self, trainer: DISTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Writes the line, on the main process only."""
        if state.is_world_process_zero:
            tell(args, opening_line(self.trainer))


def opening_line(trainer: DISTrainerMixin) -> str:
    """The classes, the student logits of a step, speed and memory beside all classes, the kernels, and the report.

    Args:
        trainer: whose training begins.
    """
    distiller = trainer.distiller
    facts = [_classes(distiller), *_gains(trainer), f"kernels: {_kernels(trainer.args.device)}"]
    warmup = distiller.arguments.get_exact_warmup_steps(trainer.state.max_steps)
    if warmup and distiller.mode == "sampled":
        facts.append(f"the first {warmup:,} steps compute all classes")
    if any(isinstance(callback, DISReportCallback) for callback in trainer.callback_handler.callbacks):
        facts.append(f"report: {Path(trainer.args.output_dir) / FOLDER / PAGE}")
    return "hf_dis: " + "; ".join(facts)


def _classes(distiller: Distiller) -> str:
    if distiller.mode == "exact":
        timed = "" if distiller.costs is None else f"; timed: {distiller.costs}"
        return f"all {distiller.num_classes:,} classes are computed (exact distillation{timed})"
    sampler = distiller.sampler
    shared = f", of which {sampler.num_shared:,} in {sampler.num_tails} shared tails" if sampler.num_shared else ""
    return f"{sampler.columns:,} of {distiller.num_classes:,} classes per item are sampled{shared}"


def _gains(trainer: DISTrainerMixin) -> list[str]:
    """Time and memory of the head's step, where classes are sampled."""
    distiller = trainer.distiller
    if distiller.mode == "exact":
        return []
    num_items = trainer._expected_items() or TOKENS
    expected = estimate_head(
        num_items,
        distiller.num_classes,
        _num_features(trainer),
        distiller.sampler.columns - distiller.sampler.num_shared,
        distiller.sampler.num_shared,
        ranks_teacher=trainer.teacher_cache is None,
    )
    if distiller.costs is None:
        speed, source = expected.blocks.seconds / expected.sampled.seconds, f"estimated for an {A100.name}"
    else:
        speed, source = distiller.costs.exact / distiller.costs.sampled, "timed"
    memory = f"{_size(expected.sampled.memory)} in place of {_size(expected.blocks.memory)}"
    return [
        f"a head step {speed:.2g} times as fast as with all classes ({source})",
        f"logits and loss of {num_items:,} items take {memory} (estimated)",
    ]


def _num_features(trainer: DISTrainerMixin) -> int:
    """The width of the head's input."""
    layer = trainer.distiller.student.get_submodule(trainer.distiller.head_layers[0])
    return layer.in_features


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.3g} MB"


def _kernels(device: torch.device) -> str:
    return "triton" if uses_triton(device) else "torch"
