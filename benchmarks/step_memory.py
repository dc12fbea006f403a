"""The memory of a Trainer's steps."""

from __future__ import annotations

import ctypes
import platform

import torch
from timing import peak_memory
from transformers import TrainerCallback

# The steps that are measured; the trainer's own measurements are at every tenth.
PEAK_STEPS = (5, 7)
# mallopt(3) of glibc: memory of this size and more is given back as soon as it is freed. So only memory in use counts.
M_MMAP_THRESHOLD, SMALL, USUAL = -3, 2**16, 2**25


class StepMemory(TrainerCallback):
    """Measures the most memory of a few steps beyond weights and moments, in MB; None where it cannot be measured.

    Args:
        device: of the steps.
    """

    def __init__(self, device: torch.device):
        self.device, self.megabytes, self._peak = device, None, None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == PEAK_STEPS[0]:
            for moments in optimizer.state.values():  # a page becomes memory once it is written
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name].add_(0)
            self._give_back_from(SMALL)
            self._peak = peak_memory(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == PEAK_STEPS[1] and self._peak is not None:
            self.megabytes = self._peak.megabytes()
            self._give_back_from(USUAL)

    def _give_back_from(self, size: int) -> None:
        if self.device.type == "cpu" and platform.system() == "Linux":
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, size)
