"""Progress of a training for the reader: lines beside the progress bar, and where one has to wait."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_dis.kernels import uses_triton

if TYPE_CHECKING:
    from hf_dis.trainer.mixin import DISTrainerMixin

logger = logging.get_logger(__name__)


def tell(args: TrainingArguments, line: str) -> None:
    """Writes a line to stderr beside the progress bar, on the main process.

    The line goes to the logger of this module, at the level ``info``, with ``disable_tqdm``. No line is written if
    ``log_level`` is ``error`` or ``critical``.

    Args:
        args: of the training.
        line: to be written.
    """
    if args.process_index != 0:
        return
    if args.disable_tqdm:
        logger.info(line)
    elif args.get_process_log_level() <= logging.WARNING:
        tqdm.write(line, file=sys.stderr)


def timed_items(trainer: DISTrainerMixin) -> int | None:
    """The number of items for the timing that ``head_mode="auto"`` does, which is announced; None without a timing.

    Args:
        trainer: whose engine is about to be made.
    """
    if trainer.args.head_mode != "auto":
        return None
    device = trainer.args.device
    tell(trainer.args, f"hf_dis: head_mode='auto' compares all classes with sampled classes on {device} ...")
    return trainer._expected_items()


class FirstStep(TrainerCallback):
    """Announces a first step that compiles kernels or the student, and logs its duration."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._is_done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the next step the first one."""
        self._started, self._is_done = None, False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Announces the first step."""
        if self._is_done or not (args.torch_compile or uses_triton(args.device)):
            return
        compiled = " and ".join(
            name
            for name, is_compiled in (("the student", args.torch_compile), ("kernels", uses_triton(args.device)))
            if is_compiled
        )
        tell(args, f"hf_dis: the first step checks the student's head and compiles {compiled} ...")
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Logs the duration of the first step."""
        self._is_done = True
        if self._started is not None:
            tell(args, f"hf_dis: the first step took {time.perf_counter() - self._started:.1f} seconds")
            self._started = None
