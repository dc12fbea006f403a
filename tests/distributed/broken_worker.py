"""Runs of test_broken_processes: trainings of a sharded head that die or are killed, and their continuations."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from equality_worker import SamplesByLabel
from launch import become, free_port
from sharded_head_worker import GRADIENTS, examples, settings, student, teacher, whole
from transformers import TrainerCallback

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.head import gathered_items
from hf_dis.trainer.manifest import what_is_torn

TIMEOUT = 30  # seconds
TIMEOUT_OF_KILLS = 120
LENGTH = {"max_steps": 16, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}

# The ranks of processes, and the callback that breaks them.
Breaking = tuple[range, Callable[[], TrainerCallback]]


class Breaks(TrainerCallback):
    """Lets a process break in the middle of a step: features are gathered, and logits are not sent back."""

    def __init__(self, step: int, how: Callable[[], None]):
        self.step, self.how = step, how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            mock.patch.object(gathered_items, "own_columns", lambda *args: self.how()).start()


class Waits(TrainerCallback):
    """Lets a process wait for its kill, since a fast machine would train to the end, and past the next kill's step.

    Args:
        step: of the checkpoint that the kill waits for.
        file: of this checkpoint, which is written and waits to be renamed. Empty: the process waits two steps later.
        seconds: to wait.
    """

    def __init__(self, step: int, file: str, seconds: int):
        self.step, self.file, self.seconds, self.replace = step, file, seconds, os.replace

    def on_train_begin(self, args, state, control, **kwargs):
        mock.patch.object(os, "replace", self.replaced).start()

    def replaced(self, source: str | Path, target: str | Path) -> None:
        if self.file and str(source).endswith(self.file) and f"checkpoint-{self.step}/" in str(source):
            time.sleep(self.seconds)
        self.replace(source, target)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step + 1:
            time.sleep(self.seconds)


def train(folder: Path, timeout: int, breaks: TrainerCallback | None = None) -> None:
    """Resumes from the newest whole checkpoint, trains to the end, and saves the student."""
    torn = {path.name: what_is_torn(path) for path in folder.glob("checkpoint-*")}
    gradients = GRADIENTS["row-sparse"] | {"moment_dtype": "bfloat16"}
    # Joined before the configuration is made, which on a processor would leave out the timeout.
    PartialState(cpu=True, timeout=timedelta(seconds=timeout))
    args = DISConfig(output_dir=str(folder), **settings(num_tails=1, **gradients) | LENGTH)
    made = DISDistillationTrainer(
        student("image", True),
        teacher("image"),
        args,
        train_dataset=examples("image"),
        callbacks=[] if breaks is None else [breaks],
    )
    made.distiller.sampler.__class__ = SamplesByLabel
    made.train(resume_from_checkpoint=None in torn.values())
    found = whole(made.model, dict(made.model.state_dict()))
    if made.args.process_index == 0:
        torch.save({"student": found, "torn": [name for name, wrong in torn.items() if wrong]}, folder / "end.pt")
    PartialState().destroy_process_group()


def child(rank: int, number: int, port: int, folder: Path, breaking: Breaking | None, timeout: int):
    """A process of a training."""
    become(rank, number, port, folder)
    torch.set_num_threads(1)
    train(folder, timeout, breaking[1]() if breaking is not None and rank in breaking[0] else None)


def started(
    number: int, folder: Path, breaking: Breaking | None = None, timeout: int = TIMEOUT_OF_KILLS
) -> list[multiprocessing.Process]:
    """Starts the processes of a training."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    fork = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    given = [(rank, number, port, folder, breaking, timeout) for rank in range(number)]
    found = [fork.Process(target=child, args=one) for one in given]
    for one in found:
        one.start()
    return found


def kill(processes: list[multiprocessing.Process], folder: Path, step: int, moment: float | str) -> None:
    """Kills the processes of a training, or one of them, and waits until all have ended.

    Args:
        processes: of the training.
        folder: its output.
        step: to kill at, when its checkpoint has begun.
        moment: seconds to wait then; or the end of a file's name, to kill while there is such a file.
    """
    checkpoint = folder / f"checkpoint-{step}"
    wanted = checkpoint.exists if isinstance(moment, float) else lambda: any(checkpoint.glob(f"*{moment}"))
    while all(one.is_alive() for one in processes) and not wanted():
        time.sleep(0.0005)
    time.sleep(moment if isinstance(moment, float) else 0)
    assert all(one.is_alive() for one in processes), "a process had ended by itself"
    killed = processes if step % 2 else processes[1:]  # the first one then ends by an error
    for one in killed:
        os.kill(one.pid, signal.SIGKILL)
    for one in processes:
        one.join()
    print("killed", [one.exitcode for one in processes], sorted(one.name for one in folder.glob("check*")), flush=True)


def run(folder: Path, number: int, last_number: int, moments: list[float | str]) -> None:
    """Kills a training again and again, and lets another number of processes end it."""
    for place, moment in enumerate(moments, 1):
        # The first process renames files; every kill ends the second.
        step = 2 * place + place % 2
        file, ranks = (moment, range(1)) if isinstance(moment, str) else ("", range(1, 2))
        waits = functools.partial(Waits, step, file, TIMEOUT_OF_KILLS)
        kill(started(number, folder, (ranks, waits)), folder, step, moment)
    ended(started(last_number, folder))


def ended(processes: list[multiprocessing.Process]) -> None:
    """Waits for the end of a training."""
    for one in processes:
        one.join()
    assert not any(one.exitcode for one in processes), [one.exitcode for one in processes]


def run_broken(folder: Path, number: int, how: str) -> None:
    """Lets the second process break in the third step, and waits for the errors of the remaining ones."""
    hows = {"exits": lambda: os._exit(3), "stops": lambda: os.kill(os.getpid(), signal.SIGSTOP)}
    processes = started(number, folder, (range(1, 2), lambda: Breaks(2, hows[how])), TIMEOUT)
    for rank, one in enumerate(processes):
        if rank != 1:
            one.join()
    if how == "stops":
        os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].join()
    print(*(one.exitcode for one in processes), flush=True)


def moments_of(argument: str) -> list[float | str]:
    """Ends of files' names, or a number of random moments: ``".part,3"``."""
    found: list[float | str] = []
    for one in argument.split(","):
        found += [random.uniform(0, 0.6) for _ in range(int(one))] if one.isdigit() else [one]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, where, count, last, *killed = sys.argv
    if last in ("exits", "stops"):
        run_broken(Path(where), int(count), last)
    else:
        run(Path(where), int(count), int(last), moments_of(killed[0]) if killed else [])
