"""What a training step of the output head costs by the number of classes: loss, backward, clipping and optimizer.

    python benchmarks/head_scaling.py --json head_scaling.json

Random features, a random head without bias, and a teacher whose answers are given: its log-probabilities, ranking and
class marginal are computed once, outside of what is measured. All methods step the same weight in turn; medians. The
dense ones share one fused AdamW. Methods:

exact           every logit, KL divergence by F.kl_div
chunked_exact   the same by chunks of 32 rows, each with its backward at once, so that no [N, C] outlives a chunk
liger           LigerFusedLinearJSDLoss with beta 0, if liger-kernel is installed, teacher head included
partial_fc      a uniform tenth of the classes for all rows, softmax over these; sparse gradients, RowSparseAdamW
dis_dense       DIS with a dense gradient
dis_row_sparse  DIS with row_sparse_head and RowSparseAdamW

peak_mb is what a step takes beyond what lies there between steps (weight, moments, the teacher's answers): the highest
resident size over two steps, in a fresh process for each method, less the resident size before them. Linux only. From
--dense_up_to classes on the methods with a dense gradient are not run; exact is extrapolated in proportion to C.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis import SamplerSpec, RowSparseAdamW, make_sampler
from hf_dis.distributed.sums import average_rows
from hf_dis.head.row_gradients import clip_grad_norm_
from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.teacher.targets import TeacherTargets

TEMPERATURE, ROWS, FEATURES, CHUNK_ROWS, PARTIAL_FC_SHARE = 2.0, 128, 256, 32, 0.1
LAYOUTS = {
    "default": {"num_sampled_classes": 32, "num_shared_classes": 512, "num_tails": 4, "num_updated_classes": 16},
    "per row": {"num_sampled_classes": 128, "num_shared_classes": 0, "num_tails": 1},
}
# Those without a layout compute the same whatever it is.
DENSE = ["exact", "chunked_exact", "liger", "dis_dense"]
METHODS = ["exact", "chunked_exact", "liger", "partial_fc", "dis_dense", "dis_row_sparse"]


class GivenTargets(TeacherTargets):
    """A teacher's answers, all of them computed beforehand.

    Args:
        log_probs: at the temperature, ``[N, C]``.
        depth: m, how many ranks to resolve.
    """

    def __init__(self, log_probs: Tensor, depth: int):
        super().__init__(log_probs, 1.0, depth)
        self.mass = super().class_mass()

    def class_mass(self) -> Tensor:
        return self.mass


class Steps:
    """Training steps of a head by each method, on the same tensors."""

    def __init__(self, num_classes: int, layout: str):
        torch.manual_seed(0)
        self.features = torch.randn(ROWS, FEATURES, requires_grad=True)
        self.weight = torch.nn.Parameter(torch.randn(num_classes, FEATURES) / FEATURES**0.5)
        self.log_probs = (3 / TEMPERATURE * torch.randn(ROWS, num_classes)).log_softmax(1)
        self.sampler = make_sampler(num_classes, SamplerSpec(**LAYOUTS[layout]))
        self.targets = GivenTargets(self.log_probs, self.sampler.rank_depth)
        self.dense = torch.optim.AdamW([self.weight], lr=1e-3, fused=True)
        self.sparse = RowSparseAdamW([self.weight], lr=1e-3)

    def run(self, method: str) -> None:
        """One step: loss, backward, clipping, optimizer."""
        getattr(self, method)()
        optimizer = self.dense
        if self.weight.grad.is_sparse:
            average_rows([self.weight])  # over one process: as the trainer does it, each row once
            optimizer = self.sparse
        clip_grad_norm_([self.weight], 1.0)
        optimizer.step()
        self.weight.grad = self.features.grad = None

    def _kl(self, logits: Tensor, log_probs: Tensor) -> Tensor:
        loss = F.kl_div((logits / TEMPERATURE).log_softmax(1), log_probs, reduction="sum", log_target=True)
        return TEMPERATURE**2 * loss / ROWS

    def exact(self) -> None:
        self._kl(self.features @ self.weight.T, self.log_probs).backward()

    def chunked_exact(self) -> None:
        for features, log_probs in zip(self.features.split(CHUNK_ROWS), self.log_probs.split(CHUNK_ROWS), strict=True):
            self._kl(features @ self.weight.T, log_probs).backward()

    def liger(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=False
        )
        labels = torch.zeros(ROWS, dtype=torch.long)
        teacher = self.weight.detach()
        loss(self.features, self.weight, self.features.detach(), teacher, labels).backward()

    def partial_fc(self) -> None:
        num_classes = len(self.weight)
        sampled = torch.randperm(num_classes)[: int(PARTIAL_FC_SHARE * num_classes)]
        rows = F.embedding(sampled, self.weight, sparse=True)
        self._kl(self.features @ rows.T, self.log_probs[:, sampled].log_softmax(1)).backward()

    def dis_dense(self) -> None:
        self._dis(row_sparse=False)

    def dis_row_sparse(self) -> None:
        self._dis(row_sparse=True)

    def _dis(self, row_sparse: bool) -> None:
        with torch.no_grad():
            sample = self.sampler.sample([self.targets])
        ids, updates = (sample.item_ids, sample.tail_ids), sample.updates if row_sparse else None
        logits = sampled_logits(self.features, self.weight, None, *ids, row_sparse, updates)
        loss, signal = sampled_forward_kl(logits, sample, TEMPERATURE)
        self.sampler.learn(sample, signal)
        loss.mean().backward()


def milliseconds(
    steps: Steps, methods: list[str], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median time of a step of each method, measured in turn, after a round that is not counted."""
    times: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats + 1):
        for method in methods:
            started = clock()
            steps.run(method)
            times[method].append(1000 * (clock() - started))
    return {method: statistics.median(values[1:]) for method, values in times.items()}


def resident_mb(name: str) -> float:
    """VmRSS or VmHWM of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def peak_of_a_step(steps: Steps, method: str) -> float:
    """Megabytes that a step needs on top of what is there between steps; to be run in a process of its own."""
    steps.run(method)  # makes the moments
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    floor = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    for _ in range(2):
        steps.run(method)
    return resident_mb("VmHWM") - floor


def peak_mb(script: str, method: str, *setting: str) -> float | None:
    """:func:`peak_of_a_step`, which ``script --peak METHOD`` prints, in a fresh process; None without a /proc."""
    if platform.system() != "Linux":
        return None
    # So that glibc gives back what is freed, and only what is in use is counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, "--peak", method, *setting]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def extrapolated(records: list[dict], num_classes: int) -> float | None:
    """Exact at more classes than were run, in proportion from the most that were."""
    exact = [record for record in records if record["method"] == "exact" and not record["extrapolated"]]
    most = max(exact, key=lambda record: record["classes"], default=None)
    return None if most is None else most["ms"] * num_classes / most["classes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--dense_up_to", type=int, default=300_000, help="classes; exact at 300,000 takes 2 GB")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument(
        "--cpu_time", action="store_true", help="processor time of all threads, where other work runs beside"
    )
    parser.add_argument("--no_peaks", action="store_true", help="times only")
    parser.add_argument("--peak", choices=METHODS, help="print the peak of one method's step, and nothing else")
    arguments = parser.parse_args()
    if arguments.peak:
        steps = Steps(arguments.classes[0], arguments.layouts[0])
        print(peak_of_a_step(steps, arguments.peak))
        return
    methods = arguments.methods
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if "liger" in methods and importlib.util.find_spec("liger_kernel") is None:
        methods = [method for method in methods if method != "liger"]
        print("liger is left out: liger-kernel is not installed")
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    kind = "processor time" if arguments.cpu_time else "time"
    print(f"{kind}; {threads}, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| C | layout | method | ms | exact / method | peak MB |")
    print("|---|---|---|---|---|---|")
    records: list[dict] = []
    for layout in arguments.layouts:
        for num_classes in arguments.classes:
            too_many = num_classes > arguments.dense_up_to
            here = [method for method in methods if not (too_many and method in DENSE)]
            times = milliseconds(Steps(num_classes, layout), here, arguments.repeats, clock)
            if too_many and "exact" in methods and (guess := extrapolated(records, num_classes)):
                times = {"exact": guess, **times}
            for method, ms in times.items():
                was_run = method in here
                setting = ["--classes", str(num_classes), "--layouts", layout]
                record = {
                    "method": method,
                    "layout": layout,
                    "classes": num_classes,
                    "rows": ROWS,
                    "features": FEATURES,
                    "sampled": LAYOUTS[layout]["num_sampled_classes"],
                    "shared": LAYOUTS[layout]["num_shared_classes"],
                    "tails": LAYOUTS[layout]["num_tails"],
                    "ms": ms,
                    "peak_mb": peak_mb(__file__, method, *setting) if was_run and not arguments.no_peaks else None,
                    "extrapolated": not was_run,
                }
                records.append(record)
                ratio = f"{times['exact'] / ms:.1f}" if "exact" in times else ""
                peak = "" if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
                name = method if was_run else f"{method} (extrapolated)"
                print(f"| {num_classes:,} | {layout} | {name} | {ms:,.1f} | {ratio} | {peak} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
