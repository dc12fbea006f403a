"""The share of a training's time that the estimate of the gradient's error takes.

    python benchmarks/error_time.py --json error_time.jsonl
    python benchmarks/error_time.py --tasks --json error_time.jsonl  # prints what the file has

The tasks are glyphs and text of benchmarks/parity.py, at equal rates of body and head. In "logged", the default, the
trainer estimates ``dis/gradient_error`` for its logs, at every tenth step. In "followed" the numbers of classes follow
the error: ``gradient_error`` is 0.3 for glyphs and 0.03 for text. share is the time of the estimates over the time of
all steps, loader and teacher included. Both are processor time of all threads. On an
accelerator they are the time between events of the device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import append, command, header, machine, parse, parser, read, row
from parity_tasks import glyphs, text
from timing import stopwatch
from transformers import set_seed
from transformers.utils import logging

TASKS = {"glyphs": glyphs, "text": text}
ACCEPTED = {"glyphs": 0.3, "text": 0.03}


def timed(function: Callable, spent: list[float], device: torch.device) -> Callable:
    """The same function, which adds the milliseconds of each call to a list."""
    watch = stopwatch(device, cpu_time=True)

    def call(*args: Any) -> Any:
        watch.start()
        found = function(*args)
        spent.append(watch.stop())
        return found

    return call


def measure(task: str, make: Callable, settings: dict[str, Any], steps: int, device: torch.device) -> dict[str, Any]:
    """Trains a student for some steps; returns the number of estimates, and both times in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"max_steps": steps, "disable_tqdm": True, "use_cpu": device.type == "cpu"}
        trainer = make(1.0, output_dir=folder, **common, **settings)
        set_seed(0)
        spent: list[float] = []
        trainer.distiller.gradient_error = timed(trainer.distiller.gradient_error, spent, device)
        whole = stopwatch(device, cpu_time=True).milliseconds(trainer.train)
    seconds = {"estimates_s": sum(spent) / 1000, "steps_s": whole / 1000}
    return {"task": task, "steps": steps, "estimates": len(spent), **seconds}


def print_table(records: list[dict]) -> None:
    """A line for each record."""
    print(header("task", "error", "estimates", "of steps", "ms per estimate", "ms per step", "share"))
    for one in records:
        each = one["estimates_s"] / one["estimates"], one["steps_s"] / one["steps"]
        times = *(f"{1000 * seconds:.0f}" for seconds in each), f"{one['estimates_s'] / one['steps_s']:.1%}"
        print(row(one["task"], one["error"], one["estimates"], one["steps"], *times))


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    made.add_argument("--teacher", help="of the glyphs, saved by run_glyphs.py; trained first if not given")
    made.add_argument("--text_teacher", help="of the text, with its tokenizer; trained first if not given")
    made.add_argument("--folder", default="runs/parity", help="of teachers that are trained")
    made.add_argument("--steps", type=int, default=100)
    given = parse(made)
    if given.json is None:
        made.error("--json is needed: the file of the records, to which a call adds its own")
    logging.set_verbosity_error()
    print(machine(given.device))
    for task in given.tasks:
        make = TASKS[task](given.teacher if task == "glyphs" else given.text_teacher, given.folder)
        for name, settings in (("logged", {}), ("followed", {"gradient_error": ACCEPTED[task]})):
            record = measure(task, make, settings, given.steps, given.device)
            append(given.json, {"error": name, "command": command(), **record}, given.device)
    print_table(read(given.json))


if __name__ == "__main__":
    main()
