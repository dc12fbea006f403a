"""The quality of the student that each method makes, against its computed logits and its time: the glyph task.

    python benchmarks/quality_vs_k.py --teacher runs/glyphs/teacher --json quality_vs_k.jsonl --seeds 0 1 2
    python benchmarks/quality_vs_k.py --teacher runs/glyphs/teacher --json quality_vs_k.jsonl --time
    python benchmarks/quality_vs_k.py --json quality_vs_k.jsonl --plot docs/images/quality_vs_k.svg

The demo's task and schedule (4 epochs, batches of 256), no hard labels. The first command trains one student for each
method and seed, each method at its best head learning rate, and writes a line for each student. A run that is in the
file already is not run again. The second command times the student's side of a training step, methods in turn: all of
the step but the teacher's forward and the images. Every call prints the table of the file's records.

With --device the trainings are on the device, in float32. The time of a step there waits for each of the teacher's
chunks. A file has the records of one device.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from common import add_device, append, header, machine, parse, read, row
from timing import Stopwatch, stopwatch
from torch import Tensor
from transformers import TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from glyph_task import load_task, load_teacher, student_trainer

from hf_dis import SamplerSpec, make_sampler
from hf_dis.items import Items
from hf_dis.teacher.stream import LogitStream

CLASSES = 3375


def per_item(num_sampled: int, head_rate: float = 20, **settings) -> dict:
    """Classes sampled item by item, with every rank resolved."""
    sizes = {"num_sampled_classes": num_sampled, "num_shared_classes": 0, "rank_depth": CLASSES}
    return {**sizes, "head_rate": head_rate, **settings}


def two_strata(num_sampled: int, num_shared: int, num_tails: int = 1, head_rate: float = 20, **settings) -> dict:
    """Classes sampled from each item's 2 K best-ranked ones, and shared tails."""
    return {
        "num_sampled_classes": num_sampled,
        "rank_depth": 2 * num_sampled,
        "num_shared_classes": num_shared,
        "num_tails": num_tails,
        "head_rate": head_rate,
        **settings,
    }


# The settings of each training. Head rates are multiples of the body's rate, each the best of several.
METHODS = {
    "exact": {"head_mode": "exact", "head_rate": 28},
    "dis 32": per_item(32),
    "dis 64": per_item(64),
    "dis 128": per_item(128),
    "dis 256": per_item(256, 28),
    "dis 337": per_item(337, 40),
    "dis 128 row-sparse": per_item(128, row_sparse_head=True),
    "dis 128 warm-up": per_item(128, exact_warmup_steps=0.1),
    "two strata 32+256": two_strata(32, 256),
    "two strata 64+512": two_strata(64, 512),
    "two strata 64+512 row-sparse": two_strata(64, 512, row_sparse_head=True),
    "two strata 64+512 warm-up": two_strata(64, 512, exact_warmup_steps=0.1),
    "two strata 128+208": two_strata(128, 208),
    "several tails 32+8x256": two_strata(32, 256, 8, 28),
    "several tails 32+4x512": two_strata(32, 512, 4, 28),
    "several tails 32+4x512 row-sparse": two_strata(32, 512, 4, 28, row_sparse_head=True),
    "several tails 32+4x512 U=4": two_strata(32, 512, 4, 28, row_sparse_head=True, num_updated_classes=4),
    "several tails 64+4x1024 row-sparse": two_strata(64, 1024, 4, 28, row_sparse_head=True),
    "several tails 64+16x256": two_strata(64, 256, 16, 40),
    "several tails 64+16x256 row-sparse": two_strata(64, 256, 16, 28, row_sparse_head=True),
    "several tails 64+16x256 warm-up": two_strata(64, 256, 16, exact_warmup_steps=0.1),
    "several tails 64+32x256": two_strata(64, 256, 32, 40),
    "ftis 128": per_item(128, proposal="teacher", design="replacement"),
    "ftis 337": per_item(337, proposal="teacher", design="replacement"),
    "uniform 128": per_item(128, proposal="uniform"),
    "uniform 337": per_item(337, proposal="uniform"),
    "top-k 128": {"num_sampled_classes": 128, "proposal": "topk", "head_rate": 12},
    "top-k 337": {"num_sampled_classes": 337, "proposal": "topk", "head_rate": 12},
}


def sizes(settings: dict, items: int = 256) -> dict[str, int]:
    """Student logits computed per item, and the rows of W that a batch touches at most: means over the steps."""
    exact = 1 if settings.get("head_mode") == "exact" else settings.get("exact_warmup_steps", 0)
    of_sampler = {one.name: settings[one.name] for one in fields(SamplerSpec) if one.name in settings}
    spec = SamplerSpec(**of_sampler).resolved(row_sparse=settings.get("row_sparse_head", False))
    sampler = make_sampler(CLASSES, spec)
    touched = items * sampler.num_sampled + sampler.num_tails * sampler.num_shared
    touched = min(touched, items * (spec.num_updated_classes or touched))
    numbers = {"logits": sampler.columns, "rows_touched": touched}
    return {name: round(exact * CLASSES + (1 - exact) * number) for name, number in numbers.items()}


def train(name: str, seed: int, settings: dict, teacher, task, device: torch.device) -> dict:
    """Trains and evaluates one student."""
    with tempfile.TemporaryDirectory() as folder:
        run = {"output_dir": folder, "seed": seed, "disable_tqdm": True, "use_cpu": device.type == "cpu"}
        trainer = student_trainer(teacher, task, **run, **settings)
        set_seed(seed)
        trainer.train()
        metrics = trainer.evaluate()
    return {
        "method": name,
        "seed": seed,
        "head_rate": settings["head_rate"],
        **sizes(settings),
        **{key: metrics[f"eval_{key}"] for key in ("top1", "top5", "kl")},
    }


class TimedStream:
    """A teacher's stream of logits that measures its own time.

    Args:
        stream: of the teacher.
        watch: of its device.
    """

    def __init__(self, stream: LogitStream, watch: Stopwatch):
        self.stream, self.watch, self.milliseconds = stream, watch, 0.0

    def __call__(self, inputs: dict[str, Tensor], items: Items, chunks: int | None = None) -> Iterator[Tensor]:
        self.watch.start()
        for chunk in self.stream(inputs, items, chunks):
            self.milliseconds += self.watch.stop()
            yield chunk
            self.watch.start()


class StudentTime(TrainerCallback):
    """Time of each optimizer step, from its batch to the cleared gradient, less the teacher's forward.

    Args:
        teacher: its stream.
        watch: of the student's device.
    """

    def __init__(self, teacher: TimedStream, watch: Stopwatch):
        self.teacher, self.watch = teacher, watch
        self.milliseconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.teacher.milliseconds = 0.0
        self.watch.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.milliseconds.append(self.watch.stop() - self.teacher.milliseconds)


def student_milliseconds(settings: dict, teacher, task, num_steps: int, device: torch.device) -> list[float]:
    """The student's side of a few steps, after two that are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        run = {"output_dir": folder, "max_steps": num_steps + 2, "disable_tqdm": True}
        trainer = student_trainer(teacher, task, **run, use_cpu=device.type == "cpu", **settings)
        teacher = trainer.distiller.online_teacher
        teacher.stream = TimedStream(teacher.stream, stopwatch(device))
        times = StudentTime(teacher.stream, stopwatch(device))
        trainer.add_callback(times)
        trainer.train()
    return times.milliseconds[2:]


def check_device(records: list[dict], device: torch.device, path: Path) -> None:
    """Checks that the records of a file are of one device.

    Raises:
        SystemExit: if a record is of a different type of device.
    """
    others = {record.get("device", "cpu") for record in records} - {device.type}
    if others:
        raise SystemExit(
            f"{path} has records of {', '.join(sorted(others))}, and --device is {device.type}: means and times are "
            "those of one device; give another --json"
        )


def summary(records: list[dict]) -> list[dict]:
    """One entry per method and head rate: means over seeds, and the latest time of a step."""
    times = {record["method"]: record["student_ms"] for record in records if "student_ms" in record}
    runs: dict[tuple[str, float], list[dict]] = {}
    for record in records:
        if "top1" in record:
            runs.setdefault((record["method"], record["head_rate"]), []).append(record)
    entries = []
    for group in runs.values():
        values = [record["top1"] for record in group]
        entries.append(
            {
                **{key: group[0][key] for key in ("method", "head_rate", "logits", "rows_touched")},
                **{key: statistics.mean(record[key] for record in group) for key in ("top1", "top5", "kl")},
                "seeds": len(group),
                "spread": max(values) - min(values),
                "student_ms": times.get(group[0]["method"]),
            }
        )
    return entries


def table(entries: list[dict]) -> str:
    """The entries as Markdown."""
    names = ("method", "logits per item", "rows of W", "head rate", "seeds", "top-1", "spread", "top-5", "KL")
    lines = [header(*names, "student ms per step")]
    for entry in entries:
        logits = f"{entry['logits']:,} ({entry['logits'] / CLASSES:.1%})"
        setting = entry["method"], logits, f"{entry['rows_touched']:,}", f"x{entry['head_rate']:g}", entry["seeds"]
        quality = *(f"{entry[key]:.1%}" for key in ("top1", "spread", "top5")), f"{entry['kl']:.3f}"
        ms = None if entry["student_ms"] is None else f"{entry['student_ms']:.0f}"
        lines.append(row(*setting, *quality, ms))
    return "\n".join(lines)


def plot(entries: list[dict], path: Path) -> None:
    """Top-1 against logits and against the student's time, each method at its best head rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from hf_dis.report.style import COLOURS, plotted, write_svg

    best: dict[str, dict] = {}
    for entry in entries:
        if entry["top1"] > best.get(entry["method"], {"top1": -1})["top1"]:
            best[entry["method"]] = entry
    families: dict[str, list[dict]] = {}
    for method, entry in best.items():
        family = re.sub(r" [\d+x]+", "", method)
        families.setdefault(family, []).append(entry)
    with plotted():
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
        for axis, key, label in zip(
            axes, ("logits", "student_ms"), ("student logits per item", "student ms per step"), strict=True
        ):
            for number, (family, members) in enumerate(families.items()):
                members = sorted((entry for entry in members if entry[key]), key=lambda entry: entry[key])
                color, marker = COLOURS[number % len(COLOURS)], "os^Dv"[number // len(COLOURS)]
                axis.plot(
                    [e[key] for e in members], [e["top1"] for e in members], marker, ls="-", label=family, color=color
                )
            axis.set_xlabel(label)
        axes[0].set_xscale("log")
        axes[0].set_ylabel("top-1 on unseen typefaces")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    write_svg(figure, path)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a teacher saved by examples/run_glyphs.py")
    parser.add_argument("--json", type=Path, required=True, help="JSON lines, read and appended to")
    add_device(parser)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--head_rates", type=float, nargs="+", help="in place of each method's own")
    parser.add_argument("--time", action="store_true", help="time steps instead of training students")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing, eight steps each")
    parser.add_argument("--plot", type=Path, help="SVG file of a plot of the records; trains nothing")
    return parse(parser)


def time_students(arguments: argparse.Namespace, teacher, task) -> None:
    """Appends the time of a step of each method."""
    times: dict[str, list[float]] = {name: [] for name in arguments.methods}
    for _ in range(arguments.rounds):
        for name in arguments.methods:
            times[name] += student_milliseconds(METHODS[name], teacher, task, 8, arguments.device)
    for name, values in times.items():
        append(arguments.json, {"method": name, "student_ms": statistics.median(values)}, arguments.device)


def train_students(arguments: argparse.Namespace, teacher, task) -> None:
    """Appends the quality of each student that the file does not have yet."""
    done = {(r["method"], r["head_rate"], r["seed"]) for r in read(arguments.json) if "seed" in r}
    for seed in arguments.seeds:
        for name in arguments.methods:
            for head_rate in arguments.head_rates or [METHODS[name]["head_rate"]]:
                if (name, head_rate, seed) not in done:
                    settings = {**METHODS[name], "head_rate": head_rate}
                    found = train(name, seed, settings, teacher, task, arguments.device)
                    append(arguments.json, found, arguments.device)


def main() -> None:
    arguments = parse_arguments()
    print(f"{machine(arguments.device)}, transformers {transformers.__version__}", flush=True)
    if arguments.plot is None:
        check_device(read(arguments.json), arguments.device, arguments.json)
        if arguments.teacher is None:
            raise SystemExit("--teacher is needed: train one with examples/run_glyphs.py")
        run = time_students if arguments.time else train_students
        run(arguments, load_teacher(arguments.teacher), load_task())
    entries = summary(read(arguments.json))
    print(table(entries))
    if arguments.plot is not None:
        plot(entries, arguments.plot)


if __name__ == "__main__":
    main()
