"""Time and memory of a training step, for steps of several methods on the same tensors, on a processor or a device."""

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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")

# Rounds that are not counted: the first step makes the moments; on a device the next ones still compile and allocate.
WARM_UP, DEVICE_WARM_UP = 1, 3


class Steps(Protocol):
    """Training steps by several methods."""

    def run(self, method: str) -> None:
        """Makes one step: loss, backward, clipping, optimizer."""


class Stopwatch:
    """Measures the time between a start and a stop by a clock.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now

    def start(self) -> None:
        """Starts."""
        self._started = self._now()

    def stop(self) -> float:
        """Returns the milliseconds since the start."""
        return 1000 * (self._now() - self._started)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Returns the milliseconds of a call."""
        self.start()
        call()
        return self.stop()


class EventStopwatch(Stopwatch):
    """Measures the time between a start and a stop by events of a device; both wait for the device.

    Args:
        device: no processor.

    Raises:
        RuntimeError: if events of the device do not measure time.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._first, self._last = (torch.Event(device, enable_timing=True) for _ in range(2))
        self.start()
        self.stop()

    def start(self) -> None:
        torch.accelerator.synchronize(self._device)
        self._first.record()

    def stop(self) -> float:
        self._last.record()
        self._last.synchronize()
        return self._first.elapsed_time(self._last)


def stopwatch(device: torch.device, cpu_time: bool = False) -> Stopwatch:
    """The stopwatch for steps on a device.

    Args:
        device: of the steps.
        cpu_time: on a processor, measure the processor time of all threads.
    """
    if device.type == "cpu":
        return Stopwatch(time.process_time if cpu_time else time.perf_counter)
    try:
        return EventStopwatch(device)
    except RuntimeError:  # a type of device whose events do not measure time

        def now() -> float:
            torch.accelerator.synchronize(device)
            return time.perf_counter()

        return Stopwatch(now)


def add_arguments(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    """Adds the arguments of a script that times steps and measures their memory.

    Args:
        parser: of the script.
        methods: that the script knows.
    """
    parser.add_argument("--methods", choices=methods, nargs="+", default=list(methods))
    parser.add_argument("--cpu_time", action="store_true", help="processor time of all threads, for a busy machine")
    parser.add_argument("--no_peaks", action="store_true", help="times only")
    parser.add_argument("--peak", choices=methods, help="print the peak memory of one method's step, and nothing else")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="bfloat16: autocast for the student, and a teacher in bfloat16; the default on a device",
    )


def clock_name(arguments: argparse.Namespace) -> str:
    """The name of what is measured, for the first line of the output."""
    return "processor time" if arguments.cpu_time else "time"


def step_dtype(arguments: argparse.Namespace) -> torch.dtype:
    """The type that ``--dtype`` asks for, or the default of the device."""
    default = "float32" if arguments.device.type == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype or default]


def available(methods: Sequence[str], needs: dict[str, str]) -> list[str]:
    """Those of the methods whose module is installed; prints which methods are left out.

    Args:
        methods: asked for.
        needs: the module that a method needs, by method.
    """
    missing = [method for method in methods if method in needs and not _is_installed(needs[method])]
    for method in missing:
        print(f"{method} is left out: {needs[method]} is not installed")
    return [method for method in methods if method not in missing]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package of the module
        return False


@dataclass
class Measured:
    """Times and memory of the steps of several methods.

    Attributes:
        device: of the steps.
        ms: median milliseconds by method, of the methods that ran.
        left_out: the reason by method, of the methods that did not run.
        device_peaks: megabytes by method; empty on a processor, where :meth:`peak_mb` measures.
    """

    device: torch.device
    ms: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    device_peaks: dict[str, float | None] = field(default_factory=dict)

    def peak_mb(self, method: str, script: str, *setting: str) -> float | None:
        """Megabytes of a step beyond the memory in use between steps; None where they cannot be measured.

        Args:
            method: that ran.
            script: is run with ``--peak METHOD`` in a fresh process where the steps are on a processor.
            setting: further arguments of the script.
        """
        if self.device.type != "cpu":
            return self.device_peaks[method]
        return peak_in_a_process(script, method, *setting)


def measure(
    make_steps: Callable[[], Steps],
    methods: Sequence[str],
    repeats: int,
    device: torch.device,
    cpu_time: bool = False,
    peers: Collection[str] = (),
) -> Measured:
    """Measures steps of each method in turn: times, and on a device the peak memory.

    A method that needs too much memory is left out, with the reason.

    Args:
        make_steps: makes the tensors.
        methods: to run.
        repeats: rounds that are counted.
        device: of the steps.
        cpu_time: measure processor time.
        peers: methods of other packages, left out where they fail in any way.
    """
    measured = Measured(device)
    steps, why = attempted(make_steps)
    if why:
        measured.left_out = dict.fromkeys(methods, why)
        return measured
    watch, warm_up = stopwatch(device, cpu_time), WARM_UP if device.type == "cpu" else DEVICE_WARM_UP
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats + warm_up):
        for method in [method for method in methods if method not in measured.left_out]:
            watch.start()
            _, why = attempted(lambda method=method: steps.run(method), method in peers)
            times[method].append(watch.stop())
            if why:
                measured.left_out[method] = why
    ran = [method for method in methods if method not in measured.left_out]
    measured.ms = {method: statistics.median(times[method][warm_up:]) for method in ran}
    if device.type != "cpu":
        measured.device_peaks = {method: peak_of_a_step(steps, method, device) for method in ran}
    return measured


def attempted(call: Callable[[], T], whatever: bool = False) -> tuple[T | None, str | None]:
    """Calls a function that may need too much memory.

    Args:
        call: the function.
        whatever: answer any other error with a reason as well.

    Returns:
        the result and None, or None and the reason why it failed.
    """
    try:
        return call(), None
    except Exception as error:
        if is_out_of_memory(error):
            why = "needs more memory than there is"
        elif whatever:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            raise
    gc.collect()  # the traceback held the tensors of the step
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return None, why


def is_out_of_memory(error: Exception) -> bool:
    """Returns True for an allocation that failed, on a device or by torch's allocator of the processor."""
    messages = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # plain RuntimeErrors
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


class PeakMemory:
    """The highest resident size of this process from now on, beyond the size now. Linux only."""

    def __init__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.floor = _resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again

    def megabytes(self) -> float:
        """The highest size so far, less the size at the start."""
        return _resident_mb("VmHWM") - self.floor


class DevicePeakMemory(PeakMemory):
    """The most memory that tensors hold on a device from now on, beyond the memory that tensors hold now."""

    def __init__(self):
        gc.collect()
        torch.accelerator.reset_peak_memory_stats()
        self.floor = torch.accelerator.memory_allocated()

    def megabytes(self) -> float:
        return (torch.accelerator.max_memory_allocated() - self.floor) / 2**20


def peak_memory(device: torch.device) -> PeakMemory | None:
    """Starts to measure the peak memory of a device; None where it cannot be measured."""
    if device.type == "cpu":
        return PeakMemory() if platform.system() == "Linux" else None
    return DevicePeakMemory() if device.type in ("cuda", "xpu") else None  # other devices keep no peaks


def _resident_mb(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def peak_of_a_step(steps: Steps, method: str, device: torch.device) -> float | None:
    """Megabytes of a step beyond the memory in use between steps; on a processor in a process of its own."""
    steps.run(method)  # makes the moments
    peak = peak_memory(device)
    for _ in range(2):
        steps.run(method)
    return None if peak is None else peak.megabytes()


def peak_in_a_process(script: str, method: str, *setting: str) -> float | None:
    """:func:`peak_of_a_step`, which ``script --peak METHOD`` prints, in a fresh process; None without a /proc."""
    if platform.system() != "Linux":
        return None
    # glibc then gives back at once whatever is freed, so that only memory in use is counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, "--peak", method, *setting]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
