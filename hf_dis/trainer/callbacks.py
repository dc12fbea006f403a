"""Callbacks of every training: a line at the start on what will run, and the end of a training without items."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_dis.distiller import Distiller
from hf_dis.kernels import uses_triton
from hf_dis.report.callback import DISReportCallback
from hf_dis.report.records import FOLDER, PAGE
from hf_dis.trainer.expected import expected_items

if TYPE_CHECKING:
    from hf_dis.trainer.mixin import DISTrainerMixin

logger = logging.get_logger(__name__)

# Bytes of a logit in float32, the type in which losses are computed.
LOGIT_BYTES = 4


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
    """Logs one line at the start of a training about what will run.

    The line goes to stderr beside the progress bar, unless ``log_level`` is ``error`` or ``critical``. With
    ``disable_tqdm`` the line goes to the logger of this module, at the level ``info``. Other processes are quiet.
    """

    def __init__(self, trainer: DISTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Writes the line, on the main process only."""
        if not state.is_world_process_zero:
            return
        line = opening_line(self.trainer)
        if args.disable_tqdm:
            logger.info(line)
        elif args.get_process_log_level() <= logging.WARNING:
            tqdm.write(line, file=sys.stderr)


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
        return f"all {distiller.num_classes:,} classes are computed (exact distillation)"
    sampler = distiller.sampler
    shared = f", of which {sampler.num_shared:,} in {sampler.num_tails} shared tails" if sampler.num_shared else ""
    return f"{sampler.columns:,} of {distiller.num_classes:,} classes per item are sampled{shared}"


def _gains(trainer: DISTrainerMixin) -> list[str]:
    """Time and memory of the head's step, where classes are sampled."""
    distiller = trainer.distiller
    if distiller.mode == "exact":
        return []
    costs = distiller.costs
    timed = "" if costs is None else f"a head step {costs.exact / costs.sampled:.2g} times as fast as with all classes"
    speed = timed or "speed not timed, as head_mode is 'sampled'"
    num_items = expected_items(trainer)
    unit, number = ("per item", 1) if num_items is None else (f"for {num_items:,} items", num_items)
    sampled, exact = (number * LOGIT_BYTES * count for count in (distiller.sampler.columns, distiller.num_classes))
    return [speed, f"student logits {_size(sampled)} in place of {_size(exact)} {unit}"]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.3g} MB"


def _kernels(device: torch.device) -> str:
    return "triton" if uses_triton(device) else "torch"
