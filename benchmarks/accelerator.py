"""The steps of the benchmarks on one accelerator: records as JSON lines, and a page with their ratios.

    python benchmarks/accelerator.py --output_dir bench-accelerator

Runs head_scaling.py, language_model.py, training_step.py and cache_speed.py in turn, each in a process of its own.
accelerator.jsonl has the record of every line of their tables. accelerator.md has the device, the versions, the
settings and the medians. All scripts together may take 8 minutes: a script that has not ended by then is stopped, and
the page says so. Of several CUDA cards the first is used, unless CUDA_VISIBLE_DEVICES says otherwise.

--quick runs every script at sizes that are too small to measure anything; with --device cpu no accelerator is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from common import LABELS, about, add_device, header, parse, row

import hf_dis

SECONDS = 8 * 60
SETTINGS = {
    "head_scaling": "--layouts default --classes 100000 1000000 --dense_up_to 1000000 --items 1024 --features 512",
    "language_model": "--vocab 151936 262144 --tokens 8192 --width 2048 --teacher_width 2048",
    "training_step": "--classes 100000 --steps 8 --rounds 2",
    "cache_speed": "--classes 10000 100000 --images 1024 --rounds 2",
}
QUICK_SETTINGS = {
    "head_scaling": "--layouts default --classes 300 900 --items 16 --features 8 --repeats 1 --no_peaks",
    "language_model": "--vocab 1500 --tokens 64 --width 16 --teacher_width 16 --repeats 1 --no_peaks",
    "training_step": "--classes 700 --steps 1 --rounds 1 --methods exact dis_online",
    "cache_speed": "--classes 100 --images 4 --rounds 1",
}
# Methods that do not compute the loss on all classes.
NOT_EXACT = {"partial_fc", "dis_dense", "dis_row_sparse", "dis", "head_product"}


class Run(NamedTuple):
    """A script that was run.

    Attributes:
        script: its name.
        command: its command line, without the path of the records.
        end: how it ended, in words.
        succeeded: True if it ended by itself without an error.
        records: written by it.
    """

    script: str
    command: str
    end: str
    succeeded: bool
    records: list[dict]


def run(script: str, setting: str, device: torch.device, seconds: float) -> Run:
    """Runs a script.

    Args:
        script: its name, without ``.py``.
        setting: its arguments.
        device: of the steps.
        seconds: after which it is stopped.
    """
    arguments = [*shlex.split(setting), "--device", device.type]
    environment = dict(os.environ)
    if device.type == "cuda":
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "records.json"
        path = str(Path(__file__).with_name(f"{script}.py"))
        command = [sys.executable, path, *arguments, "--json", str(written)]
        started = time.monotonic()
        try:
            code = subprocess.run(command, env=environment, timeout=max(1.0, seconds)).returncode
            end = f"took {time.monotonic() - started:.0f} s" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            code, end = None, f"was stopped after {time.monotonic() - started:.0f} s, before its end"
        records = json.loads(written.read_text()) if written.exists() else []
    return Run(script, f"python benchmarks/{script}.py {shlex.join(arguments)}", end, code == 0, records)


def page(runs: list[Run], device: torch.device, quick: bool) -> str:
    """The page, in Markdown."""
    found = about(device)
    versions = [f"{label} {found[key]}" for key, label in LABELS.items() if key in found]
    versions += [f"torch {found['torch']}", f"Python {found['python']}", f"hf_dis {hf_dis.__version__}"]
    parts = [
        f"# Steps on {found['device_name']}",
        f"{date.today().isoformat()}. Device: {found['device_name']} ({device.type}). {', '.join(versions)}.",
    ]
    if quick:
        parts.append("The sizes are too small to measure anything: this page only shows that the scripts run.")
    parts.append(
        "Times are medians of milliseconds per step. `exact / method` is the time of the fastest method on all "
        "classes over that of the method. Peak MB is the memory of a step beyond the memory in use between steps."
    )
    for one in runs:
        parts += [f"## {one.script}", f"    {one.command}", f"The script {one.end}."]
        if one.records:
            parts.append(TABLES[one.script](one.records))
    return "\n\n".join(parts) + "\n"


def head_table(records: list[dict]) -> str:
    """The table of head_scaling.py."""
    sizes = {"classes": "C", "items": "N", "features": "d", "layout": "layout", "dtype": "type"}
    return method_table(records, sizes)


def language_table(records: list[dict]) -> str:
    """The table of language_model.py."""
    sizes = {"vocab": "V", "tokens": "N", "width": "d", "teacher_width": "d of the teacher", "teacher": "teacher"}
    return method_table(records, {**sizes, "dtype": "type"})


def method_table(records: list[dict], sizes: dict[str, str]) -> str:
    """A line for each method: its time, the ratio to the fastest exact method of the same sizes, and its memory.

    Args:
        records: of one script.
        sizes: the names of the columns before the method, by key of a record.
    """
    lines = [header(*sizes.values(), "method", "ms", "exact / method", "peak MB")]
    for record in records:
        setting = [f"{record[key]:,}" if isinstance(record[key], int) else record[key] for key in sizes]
        if record["ms"] is None:
            lines.append(row(*setting, record["method"], f"left out: {record['left_out']}", None, None))
            continue
        same = [one for one in records if all(one[key] == record[key] for key in sizes)]
        exact = [one["ms"] for one in same if one["method"] not in NOT_EXACT and one["ms"] is not None]
        ratio = f"{min(exact) / record['ms']:.2f}" if exact else None
        lines.append(row(*setting, record["method"], f"{record['ms']:,.2f}", ratio, megabytes(record)))
    return "\n".join(lines)


def training_table(records: list[dict]) -> str:
    """The table of training_step.py."""
    lines = [header("C", "method", "layout", "ms", "ratio to floor", "peak MB")]
    for record in records:
        times = f"{record['ms']:,.2f}", f"{record['ratio_to_floor']:.2f}"
        lines.append(row(f"{record['classes']:,}", record["method"], record["layout"], *times, megabytes(record)))
    return "\n".join(lines)


def cache_table(records: list[dict]) -> str:
    """The table of cache_speed.py."""
    lines = [header("teacher", "C", "bare forward, images/s", "caching, images/s", "ratio")]
    for record in records:
        speeds = f"{record['bare_per_s']:,.0f}", f"{record['caching_per_s']:,.0f}", f"{record['ratio']:.0%}"
        lines.append(row(record["teacher"], f"{record['classes']:,}", *speeds))
    return "\n".join(lines)


def megabytes(record: dict) -> str | None:
    """The peak memory of a record as a cell."""
    return None if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"


TABLES: dict[str, Callable[[list[dict]], str]] = {
    "head_scaling": head_table,
    "language_model": language_table,
    "training_step": training_table,
    "cache_speed": cache_table,
}


def parse_arguments() -> argparse.Namespace:
    """The command line; without --device the accelerator that is there."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    add_device(made, None if accelerator is None else accelerator.type)
    made.add_argument("--output_dir", type=Path, default=Path("bench-accelerator"))
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    if accelerator is None and made.parse_args().device is None:
        made.error(
            f"torch {torch.__version__} finds no accelerator, and one is needed: install its driver and a torch for "
            "it, or see that the scripts run by --device cpu --quick"
        )
    return parse(made)


def main() -> None:
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    settings, deadline = QUICK_SETTINGS if arguments.quick else SETTINGS, time.monotonic() + SECONDS
    runs = []
    for script, setting in settings.items():
        print(f"\n{script}", flush=True)
        runs.append(run(script, setting, arguments.device, deadline - time.monotonic()))
    records = [{"script": one.script, **record} for one in runs for record in one.records]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (arguments.output_dir / "accelerator.jsonl").write_text(lines)
    (arguments.output_dir / "accelerator.md").write_text(page(runs, arguments.device, arguments.quick))
    print(f"\nwritten: {arguments.output_dir / 'accelerator.md'} and accelerator.jsonl", flush=True)
    failed = [f"{one.script} {one.end}" for one in runs if not one.succeeded]
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
