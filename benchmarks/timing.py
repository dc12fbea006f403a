"""Time and memory of a training step, for steps of several methods on the same tensors."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol


class Steps(Protocol):
    """Training steps by several methods."""

    def run(self, method: str) -> None:
        """Makes one step: loss, backward, clipping, optimizer."""


def add_arguments(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    """Adds the arguments of a script that times steps and measures their memory.

    Args:
        parser: of the script.
        methods: that the script knows.
    """
    parser.add_argument("--methods", choices=methods, nargs="+", default=list(methods))
    parser.add_argument("--cpu_time", action="store_true", help="processor time of all threads, for a busy machine")
    parser.add_argument("--peak", choices=methods, help="print the peak memory of one method's step, and nothing else")


def available(methods: Sequence[str], needs: dict[str, str]) -> list[str]:
    """Those of the methods whose package is installed; prints which methods are left out.

    Args:
        methods: asked for.
        needs: the package that a method needs, by method.
    """
    missing = [method for method in methods if method in needs and find_spec(needs[method]) is None]
    for method in missing:
        print(f"{method} is left out: {needs[method]} is not installed")
    return [method for method in methods if method not in missing]


def clock(cpu_time: bool) -> tuple[str, Callable[[], float]]:
    """The name of the clock that ``--cpu_time`` chooses, and the clock, in seconds."""
    return ("processor time", time.process_time) if cpu_time else ("time", time.perf_counter)


def milliseconds(
    steps: Steps, methods: Sequence[str], repeats: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median time of a step of each method, measured in turn, after a round that is not counted.

    Args:
        steps: run one by one.
        methods: to time.
        repeats: rounds that are counted.
        now: the clock, in seconds.
    """
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats + 1):
        for method in methods:
            started = now()
            steps.run(method)
            times[method].append(1000 * (now() - started))
    return {method: statistics.median(values[1:]) for method, values in times.items()}


class PeakMemory:
    """The highest resident size of this process from now on, beyond the size now. Linux only."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.floor = _resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew

    def megabytes(self) -> float:
        """The highest size so far, less the size at the start."""
        return _resident_mb("VmHWM") - self.floor


def _resident_mb(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def peak_of_a_step(steps: Steps, method: str) -> float:
    """Megabytes that a step needs beyond the memory in use between steps; to be run in a process of its own."""
    steps.run(method)  # makes the moments
    peak = PeakMemory()
    for _ in range(2):
        steps.run(method)
    return peak.megabytes()


def peak_mb(script: str, method: str, *setting: str) -> float | None:
    """:func:`peak_of_a_step`, which ``script --peak METHOD`` prints, in a fresh process; None without a /proc."""
    if platform.system() != "Linux":
        return None
    # glibc then gives back at once whatever is freed, so that only memory in use is counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, "--peak", method, *setting]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
