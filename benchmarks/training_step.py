"""What distillation adds to a training step of a small network with a huge output layer, through the real Trainer.

    python benchmarks/training_step.py --json training_step.json

A RegNet of 0.6 M parameters and 256 features on 32x32 images, batches of 128, AdamW; teacher of the same kind. Each
method trains for some steps in turn, several rounds, and its floor right before it, since machines change their pace:
ratio_to_floor is the median over rounds of the two medians' ratio; ms the median of a step's time from its batch to
the cleared gradient. Methods and their floors:

headless           a loss on the features alone, the head neither run nor stepped: the floor itself
exact              exact distillation, teacher included; floor: headless and the teacher's bare forward
dis_online         row_sparse_head, teacher included; floor: headless and the teacher's bare forward
dis_given_targets  row_sparse_head, the teacher's answers computed beforehand; floor: headless
dis_cached         row_sparse_head, from a cache of the teacher's targets at its default of 300 bytes a row (32 ranked
                   classes and, of 100,000, 75 samples of the tail), look-up included; floor: headless

DIS in layouts: the default, K = 32 of each row's 64 best-ranked classes (from a cache all that are stored) and 4 tails
of K_t = 512 that rows share, of which U = 16 a row update the head; the same with all of them updating it; and classes
sampled row by row, K = 128 (from a cache the stored ones and 512 further).

peak_mb: the highest resident size of the last steps less the resident size between two of them. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from head_scaling import GivenTargets, resident_mb
from transformers import RegNetConfig, RegNetForImageClassification, TrainerCallback

from hf_dis import DISConfig, DISDistillationTrainer, TeacherCache, cache_teacher_targets

ROWS, FEATURES, TEMPERATURE = 128, 256, 2.0
PER_ROW = {"num_shared_classes": 0}
ALL_UPDATE = {"num_updated_classes": 1000}
METHODS = {
    ("headless", None): {},
    ("exact", None): {},
    ("dis_online", "default"): {},
    ("dis_online", "per row"): PER_ROW,
    ("dis_given_targets", "default"): {},
    ("dis_given_targets", "all update"): ALL_UPDATE,
    ("dis_given_targets", "per row"): PER_ROW,
    ("dis_cached", "default"): {},
    ("dis_cached", "all update"): ALL_UPDATE,
    ("dis_cached", "per row"): PER_ROW,
}


def regnet(num_classes: int, seed: int) -> RegNetForImageClassification:
    torch.manual_seed(seed)
    return RegNetForImageClassification(
        RegNetConfig(
            embedding_size=32,
            hidden_sizes=[64, 128, FEATURES],
            depths=[1, 2, 2],
            groups_width=32,
            layer_type="x",
            num_labels=num_classes,
        )
    )


class HeadlessTrainer(DISDistillationTrainer):
    """The same trainer and optimizer with a loss that the head has no part in."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model.regnet(inputs["pixel_values"]).pooler_output.square().mean()


class GivenTeacher:
    """Stands for the online teacher: the answers for the one batch that there is."""

    def __init__(self, targets: GivenTargets):
        self.targets = targets

    def __call__(self, inputs, rows, check_finite: bool = True):
        yield self.targets


class StepTimes(TrainerCallback):
    """Times steps, and notes what the memory was in them."""

    def __init__(self):
        self.milliseconds: list[float] = []
        self.peak_mb: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if platform.system() == "Linux" and state.global_step == state.max_steps - 1:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.floor = resident_mb("VmRSS")
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.milliseconds.append(1000 * (time.perf_counter() - self.started))
        if state.global_step == 1:
            # Moments that were never written are not in memory yet: each of the first steps would wait for the pages
            # of the rows that it is the first to touch, which is over after some tens of steps.
            for moments in optimizer.state.values():
                for tensor in filter(torch.is_tensor, moments.values()):
                    tensor.add_(0)
        if platform.system() == "Linux" and state.global_step == state.max_steps:
            self.peak_mb = resident_mb("VmHWM") - self.floor


def train(method: str, layout: str | None, num_classes: int, teacher, rows: list[dict], num_steps: int) -> StepTimes:
    """Trains for a few steps; the first, after which the optimizer's state is in memory, is not counted."""
    times = StepTimes()
    sampled = layout is not None
    with tempfile.TemporaryDirectory() as folder:
        args = DISConfig(
            output_dir=folder,
            max_steps=num_steps + 1,
            per_device_train_batch_size=ROWS,
            head_mode="sampled" if sampled else "exact",
            row_sparse_head=sampled,
            hard_label_weight=0.0,
            temperature=TEMPERATURE,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **METHODS[method, layout],
        )
        cache = write_cache(teacher, rows, folder) if method == "dis_cached" else None
        kind = HeadlessTrainer if method == "headless" else DISDistillationTrainer
        trainer = kind(
            regnet(num_classes, 0),
            None if cache else teacher,
            args,
            teacher_cache=cache,
            train_dataset=rows,
            callbacks=[times],
        )
        if method == "dis_given_targets":
            with torch.no_grad():
                logits = teacher(torch.stack([row["pixel_values"] for row in rows])).logits
            log_probs = (logits / TEMPERATURE).log_softmax(1)
            # One batch, whose rows come in any order: what is timed does not depend on which row is whose.
            trainer.distiller.teacher = GivenTeacher(GivenTargets(log_probs, trainer.distiller.sampler.rank_depth))
        trainer.train()
    times.milliseconds = times.milliseconds[1:]
    if cache:
        times.milliseconds = [ms + look_up_ms(cache, rows) for ms in times.milliseconds]
    return times


def write_cache(teacher, rows: list[dict], folder: str) -> TeacherCache:
    return cache_teacher_targets(
        teacher, rows, f"{folder}/cache", temperature=TEMPERATURE, batch_size=ROWS, show_progress=False
    )


def look_up_ms(cache: TeacherCache, rows: list[dict]) -> float:
    """A dataloader does it before the step, or in its workers; here it counts."""
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    started = time.perf_counter()
    cache.look_up(batch)
    return 1000 * (time.perf_counter() - started)


@torch.no_grad()
def teacher_forward(teacher, rows: list[dict], num_steps: int) -> list[float]:
    pixels, times = torch.stack([row["pixel_values"] for row in rows]), []
    for _ in range(num_steps):
        started = time.perf_counter()
        teacher(pixels)
        times.append(1000 * (time.perf_counter() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=4, help="of each method in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32, generator=generator)} for _ in range(ROWS)]
    teacher = regnet(arguments.classes, 1).eval()
    bare_forward: list[float] = []
    times: dict[tuple[str, str | None], list[float]] = {method: [] for method in METHODS}
    ratios: dict[tuple[str, str | None], list[float]] = {method: [] for method in METHODS}
    peaks = {}
    for _ in range(arguments.rounds):
        for method in METHODS:
            floor = train("headless", None, arguments.classes, teacher, rows, arguments.steps).milliseconds
            floor_ms = statistics.median(floor)
            if method[0] in ("exact", "dis_online"):
                forward = teacher_forward(teacher, rows, arguments.steps)
                floor_ms += statistics.median(forward)
                bare_forward += forward
            measured = train(*method, arguments.classes, teacher, rows, arguments.steps)
            times[method] += measured.milliseconds
            ratios[method].append(statistics.median(measured.milliseconds) / floor_ms)
            peaks[method] = measured.peak_mb
    median = {method: statistics.median(values) for method, values in times.items()}
    teacher_ms = statistics.median(bare_forward)
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{threads}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{arguments.classes:,} classes; the teacher's bare forward: {teacher_ms:.0f} ms\n")
    print("| method | layout | ms | samples/s | ratio to floor | peak MB |\n|---|---|---|---|---|---|")
    records = []
    for (method, layout), ms in median.items():
        record = {
            "method": method,
            "layout": layout,
            "classes": arguments.classes,
            "samples_per_s": 1000 * ROWS / ms,
            "ratio_to_floor": statistics.median(ratios[method, layout]),
            "peak_mb": peaks[method, layout],
        }
        records.append(record)
        peak = "" if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
        print(
            f"| {method} | {layout or ''} | {ms:,.0f} | {record['samples_per_s']:.1f} "
            f"| {record['ratio_to_floor']:.2f} | {peak} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
