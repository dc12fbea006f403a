"""Command line, device, heading, tables and records of the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch

# Printed above the tables that have both methods.
EXACT_NOTE = "exact: the library's own exact loss; exact (materialised): the loss by autograd, exact in earlier tables"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--json`` and ``--device`` that prints a script's docstring as it is written."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="file to write the records to")
    add_device(made)
    return made


def add_device(made: argparse.ArgumentParser, default: str | None = "cpu") -> None:
    """Adds ``--device``.

    Args:
        made: the parser.
        default: the device if none is given; None if one has to be given.
    """
    made.add_argument("--device", default=default, help="cpu, cuda, xpu or mps; models and tensors are made there")


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of the command line, with ``device`` as a torch.device that the machine has.

    Keeps the library and the Trainer to the processor if that is the device.
    """
    arguments = made.parse_args()
    try:
        arguments.device = checked_device(arguments.device)
    except ValueError as error:
        made.error(str(error))
    on_cpu = arguments.device.type == "cpu"
    if not on_cpu and "cpu_time" in arguments and arguments.cpu_time:
        made.error(
            f"--cpu_time is the time of processors, and --device is {arguments.device}: leave one of them out; "
            "a device is timed by its events"
        )
    if on_cpu and torch.accelerator.is_available():  # both would take the accelerator
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return arguments


def checked_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: a type of device.

    Raises:
        ValueError: if the machine has no such device.
    """
    there = ["cpu"]
    if torch.accelerator.is_available():
        there.append(torch.accelerator.current_accelerator().type)
    if name not in there:
        raise ValueError(
            f"--device is {name!r}, and torch {torch.__version__} finds {' and '.join(there)} on this machine: give "
            "one of these, without a number, or install a driver and a torch for the device. Of several "
            "cards CUDA_VISIBLE_DEVICES chooses one"
        )
    return torch.device(name)


def about(device: torch.device) -> dict[str, str]:
    """Describes a device and the versions, for the records: strings by name."""
    found = {"device": device.type, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cpu":
        return {**found, "device_name": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        runtime = {"hip": torch.version.hip} if torch.version.hip else {"cuda": torch.version.cuda}
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return {**found, "device_name": torch.cuda.get_device_name(), "capability": capability, **runtime}
    name = torch.xpu.get_device_name() if device.type == "xpu" else device.type
    return {**found, "device_name": name}


def machine(device: torch.device) -> str:
    """The device, cores, threads and versions, for the first line of the output."""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cpu":
        return f"{threads}, {versions}"
    found = about(device)
    details = [f"{label} {found[key]}" for key, label in LABELS.items() if key in found]
    return ", ".join([found["device_name"], *details, threads, versions])


LABELS = {"capability": "capability", "cuda": "CUDA", "hip": "HIP"}


def row(*cells: object) -> str:
    """One line of a Markdown table; None is an empty cell."""
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


def header(*names: str) -> str:
    """The first two lines of a Markdown table."""
    return f"{row(*names)}\n{'|---' * len(names)}|"


def read(path: Path) -> list[dict]:
    """The records of a file of JSON lines; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def command() -> str:
    """The command that started the script, for the records."""
    return " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def append(path: Path, record: dict, device: torch.device) -> None:
    """Adds a record with the description of its device to a file of JSON lines, and prints it."""
    with path.open("a") as file:
        file.write(json.dumps({**record, **about(device)}) + "\n")
    print(record, flush=True)


def write(records: list[dict], path: Path | None, device: torch.device) -> None:
    """Writes the records as JSON with the description of their device, if ``--json`` was given."""
    if path is not None:
        described = [{**record, **about(device)} for record in records]
        path.write_text(json.dumps(described, indent=1) + "\n")


def is_saved(folder: Path) -> bool:
    """Checks if a model was saved to a folder; a training that was stopped leaves a folder without one."""
    return (folder / "config.json").exists()
