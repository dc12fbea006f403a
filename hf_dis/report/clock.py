"""Times the parts of a training step, at a few steps."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

# One of this number of steps is timed. There the clock waits for an accelerator at the end of every part.
TIMED_STEPS = 10

TEACHER, STUDENT, BACKWARD = "teacher and sampling", "student forward", "loss and backward"
OPTIMIZER, DATA = "optimizer", "data"
PARTS = (DATA, TEACHER, STUDENT, BACKWARD, OPTIMIZER)


class StepClock:
    """Adds up the seconds of the parts of some steps.

    The student's forward splits the time before the backward: teacher and sampling come before the forward.

    Args:
        student: whose forward is timed; not compiled.
        device: of the training.

    Attributes:
        seconds: of each part, summed over the timed steps.
        steps: that were timed.
    """

    def __init__(self, student: nn.Module, device: torch.device):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self._student, self._device = student, device
        self._last: float | None = None
        self._has_begun = False
        self._hooks: list[RemovableHandle] = []  # on the student, within a timed step only

    def rest(self, step: int) -> None:
        """Ends a step, its logs and its evaluation: the data of the next step are read from here on.

        Args:
            step: the number of the next step.
        """
        self._last = self._now() if self._is_timed(step) else None

    def begin(self, step: int) -> None:
        """Begins a step. The first one is not timed, since its checks are made once.

        Args:
            step: its number, from 0 on.
        """
        is_first, self._has_begun = not self._has_begun, True
        if not is_first and self._is_timed(step):
            now = self._now()
            self.seconds[DATA] += 0 if self._last is None else now - self._last
            self._last = now
            self._hooks = [
                self._student.register_forward_pre_hook(lambda *_: self.mark(TEACHER)),
                self._student.register_forward_hook(lambda *_: self.mark(STUDENT)),
            ]

    def mark(self, part: str) -> None:
        """Ends a part of a timed step; has no effect in other steps."""
        if self._hooks:
            now = self._now()
            self.seconds[part] += now - self._last
            self._last = now

    def end(self) -> None:
        """Ends a step."""
        self.steps += bool(self._hooks)
        self.close()

    def close(self) -> None:
        """Takes the hooks off the student."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def means(self) -> dict[str, float]:
        """Seconds of each part per timed step; empty before the first timed step."""
        return {part: total / self.steps for part, total in self.seconds.items()} if self.steps else {}

    @staticmethod
    def _is_timed(step: int) -> bool:
        return step % TIMED_STEPS == 1

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
