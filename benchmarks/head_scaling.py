"""Time and memory of a training step of the output head by the number of classes: loss, backward, clipping, optimizer.

    python benchmarks/head_scaling.py --json head_scaling.json

The features are random, and the head is random and has no bias. The teacher's targets are given: its logits, ranking
and class marginal are computed once, outside of the measurement. All methods step the same weight in turn; the times
are medians. The dense methods share one fused AdamW. Methods:

exact                 every logit, in blocks of items, by the library's exact loss, which computes gradients in forward
exact (materialised)  every logit, KL divergence by F.kl_div and autograd; earlier tables call this method exact
chunked_exact         the same by chunks of 32 items, each with its backward at once: no [N, C] outlives a chunk
liger                 LigerFusedLinearJSDLoss with beta 0, if liger-kernel is installed, teacher head included
partial_fc            a uniform tenth of the classes for all items, softmax over these; RowSparseAdamW
dis_dense             DIS with a dense gradient
dis_row_sparse        DIS with row_sparse_head and RowSparseAdamW

exact normalises the teacher's logits in each step; the other exact methods are given log-probabilities.

With --device the tensors are made on the device, and steps are timed by its events. By default the student's head then
runs in bfloat16 autocast: the weight and its moments are float32, and the teacher's logits and head are bfloat16.
--dtype float32 turns both off. On a processor everything is float32 by default.

peak_mb is the memory that a step takes beyond the memory in use between steps (weight, moments, teacher's targets). On
a processor it is the highest resident size over two steps, in a fresh process for each method, less the resident size
before them, on Linux only. On a device it is the most that tensors held over two steps, less what they held before.
Beyond --dense_up_to classes the methods with a dense gradient are not run; exact is extrapolated in proportion to C.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import peers
import torch
import torch.nn.functional as F
from common import EXACT_NOTE, header, machine, parse, parser, row, write
from timing import Measured, add_arguments, available, clock_name, measure, peak_of_a_step, step_dtype
from torch import Tensor

from hf_dis import DISLoss, RowSparseAdamW, SamplerSpec, make_sampler
from hf_dis.distributed.sums import average_rows
from hf_dis.head.row_gradients import clip_grad_norm_
from hf_dis.loss.exact_head import exact_head_loss
from hf_dis.teacher.targets import TeacherTargets, widen

TEMPERATURE, ITEMS, FEATURES, CHUNK_ITEMS, PARTIAL_FC_SHARE = 2.0, 128, 256, 32, 0.1
LAYOUTS = {
    "default": SamplerSpec().resolved(row_sparse=True),
    "per item": SamplerSpec(num_sampled_classes=128, num_shared_classes=0, num_tails=1),
}


class GivenTargets(TeacherTargets):
    """A teacher's targets, all of them computed beforehand; arguments as for ``TeacherTargets``."""

    def __init__(self, logits: Tensor, temperature: float, depth: int):
        super().__init__(logits, temperature, depth)
        self.class_mass()  # kept for every step


def kl_divergence(logits: Tensor, log_probs: Tensor, temperature: float, reduction: str = "batchmean") -> Tensor:
    """τ² KL by autograd in float32 or wider, for log-probabilities of the teacher at the temperature, ``[N, C]``."""
    student = (widen(logits) / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(student, widen(log_probs), reduction=reduction, log_target=True)


@dataclass(frozen=True)
class Place:
    """The device and the precision of steps.

    Attributes:
        device: of all tensors.
        dtype: bfloat16 for autocast and a teacher in bfloat16, or float32. The student's weight is float32.
    """

    device: torch.device
    dtype: torch.dtype

    def precision(self) -> AbstractContextManager:
        """The context of the student's head."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


ON_CPU = Place(torch.device("cpu"), torch.float32)


def finish_step(weight: torch.nn.Parameter, dense: torch.optim.Optimizer, sparse: torch.optim.Optimizer) -> None:
    """Clips the gradient of a head and steps the head, by the optimizer for its kind of gradient."""
    optimizer = dense
    if weight.grad.is_sparse:
        average_rows([weight])  # over one process: as in the trainer, each row once
        optimizer = sparse
    clip_grad_norm_([weight], 1.0)
    optimizer.step()


class Steps:
    """Training steps of a head by each method, on the same tensors.

    Args:
        num_classes: C.
        layout: a key of ``LAYOUTS``.
        items, features: N and d.
        place: of the tensors.
    """

    def __init__(
        self, num_classes: int, layout: str, items: int = ITEMS, features: int = FEATURES, place: Place = ON_CPU
    ):
        torch.manual_seed(0)
        self.num_classes, self.place = num_classes, place
        device = self.place.device
        self.features = torch.randn(items, features, requires_grad=True, device=device)
        self.weight = torch.nn.Parameter(torch.randn(num_classes, features, device=device) / features**0.5)
        self.teacher_logits = (3 * torch.randn(items, num_classes, device=device)).to(self.place.dtype)
        spec = LAYOUTS[layout]
        sampler, dense_sampler = (
            make_sampler(num_classes, one, device=device) for one in (spec, replace(spec, num_updated_classes=None))
        )
        self.targets = GivenTargets(self.teacher_logits, TEMPERATURE, sampler.rank_depth)
        self.row_sparse_loss = DISLoss(sampler, TEMPERATURE, row_sparse_head=True)
        self.dense_loss = DISLoss(dense_sampler, TEMPERATURE)
        self.dense = torch.optim.AdamW([self.weight], lr=1e-3, fused=True)
        self.sparse = RowSparseAdamW([self.weight], lr=1e-3)

    @cached_property
    def log_probs(self) -> Tensor:
        """The teacher's log-probabilities at the temperature, ``[N, C]``."""
        return (widen(self.teacher_logits) / TEMPERATURE).log_softmax(1)

    @cached_property
    def teacher_head(self) -> Tensor:
        """The head of Liger's teacher, ``[C, d]``: the weight itself, or a copy in another type."""
        return self.weight.detach().to(self.place.dtype)

    def logits(self, features: Tensor, rows: Tensor) -> Tensor:
        """The student's logits at rows of the weight."""
        with self.place.precision():
            return features @ rows.T

    def run(self, method: str) -> None:
        """One step: loss, backward, clipping, optimizer."""
        try:
            METHODS[method](self)
            finish_step(self.weight, self.dense, self.sparse)
        finally:
            self.weight.grad = self.features.grad = None

    def exact(self) -> None:
        """All classes, by the library."""
        head = self.features, self.weight, None
        with self.place.precision():
            loss, _ = exact_head_loss(*head, lambda: [self.teacher_logits], None, TEMPERATURE, 0.0)
        loss.mean().backward()

    def materialised(self) -> None:
        """All classes, by autograd."""
        kl_divergence(self.logits(self.features, self.weight), self.log_probs, TEMPERATURE).backward()

    def chunked_exact(self) -> None:
        """All classes by autograd, chunk by chunk."""
        chunks = zip(self.features.split(CHUNK_ITEMS), self.log_probs.split(CHUNK_ITEMS), strict=True)
        for features, log_probs in chunks:
            loss = kl_divergence(self.logits(features, self.weight), log_probs, TEMPERATURE, reduction="sum")
            (loss / len(self.features)).backward()

    def liger(self) -> None:
        """All classes, by Liger."""
        labels = torch.zeros(len(self.features), dtype=torch.long, device=self.place.device)
        features = self.features.detach().to(self.place.dtype)
        with self.place.precision():
            loss = peers.liger_jsd(
                self.features, self.weight, features, self.teacher_head, labels, temperature=TEMPERATURE
            )
        loss.backward()

    def partial_fc(self) -> None:
        """A uniform share of the classes."""
        order = torch.randperm(self.num_classes, device=self.place.device)
        sampled = order[: int(PARTIAL_FC_SHARE * self.num_classes)]
        rows = F.embedding(sampled, self.weight, sparse=True)
        log_probs = self.log_probs[:, sampled].log_softmax(1)
        kl_divergence(self.logits(self.features, rows), log_probs, TEMPERATURE).backward()

    def dis_dense(self) -> None:
        """Sampled classes, by the library, with a dense gradient."""
        with self.place.precision():
            loss = self.dense_loss.of_targets(self.features, self.weight, None, [self.targets])
        loss.backward()

    def dis_row_sparse(self) -> None:
        """Sampled classes, by the library, with a row-sparse gradient."""
        with self.place.precision():
            loss = self.row_sparse_loss.of_targets(self.features, self.weight, None, [self.targets])
        loss.backward()


METHODS = {
    "exact": Steps.exact,
    "exact (materialised)": Steps.materialised,
    "chunked_exact": Steps.chunked_exact,
    "liger": Steps.liger,
    "partial_fc": Steps.partial_fc,
    "dis_dense": Steps.dis_dense,
    "dis_row_sparse": Steps.dis_row_sparse,
}
# The gradient of these methods is [C, d]; all but dis_dense compute the same in every layout.
DENSE = ["exact", "exact (materialised)", "chunked_exact", "liger", "dis_dense"]

# The module that must be installed.
NEEDS = {"liger": peers.NEEDS["liger"]}


def extrapolated(records: list[dict], num_classes: int) -> float | None:
    """Milliseconds of exact at more classes than were run, in proportion from the most that were."""
    exact = [r for r in records if r["method"] == "exact" and not r["extrapolated"] and r["ms"] is not None]
    most = max(exact, key=lambda record: record["classes"], default=None)
    return None if most is None else most["ms"] * num_classes / most["classes"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--classes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    made.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    made.add_argument("--dense_up_to", type=int, default=300_000, help="classes; exact at 300,000 takes 2 GB")
    made.add_argument("--items", type=int, default=ITEMS)
    made.add_argument("--features", type=int, default=FEATURES)
    made.add_argument("--repeats", type=int, default=7)
    add_arguments(made, list(METHODS))
    return parse(made)


def make_steps(arguments: argparse.Namespace, num_classes: int, layout: str) -> Steps:
    """The steps of one size and layout."""
    place = Place(arguments.device, step_dtype(arguments))
    return Steps(num_classes, layout, arguments.items, arguments.features, place)


def main() -> None:
    arguments = parse_arguments()
    if arguments.peak:
        steps = make_steps(arguments, arguments.classes[0], arguments.layouts[0])
        print(peak_of_a_step(steps, arguments.peak, arguments.device))
        return
    methods = available(arguments.methods, NEEDS)
    print(f"{clock_name(arguments)}; {machine(arguments.device)}")
    print(f"{EXACT_NOTE}\n")
    print(header("C", "layout", "method", "ms", "exact / method", "peak MB"))
    records: list[dict] = []
    for layout in arguments.layouts:
        for num_classes in arguments.classes:
            too_many = num_classes > arguments.dense_up_to
            here = [method for method in methods if not (too_many and method in DENSE)]
            make = partial(make_steps, arguments, num_classes, layout)
            measured = measure(make, here, arguments.repeats, arguments.device, arguments.cpu_time, peers=NEEDS)
            if too_many and "exact" in methods and (guess := extrapolated(records, num_classes)):
                measured.ms = {"exact": guess, **measured.ms}
            records += report(arguments, num_classes, layout, measured, here)
            write(records, arguments.json, arguments.device)


def report(
    arguments: argparse.Namespace, num_classes: int, layout: str, measured: Measured, were_run: list[str]
) -> list[dict]:
    """Prints the lines of one size and layout, and measures their peaks; returns the records."""
    records = []
    for method, ms in measured.ms.items():
        record = make_record(arguments, num_classes, layout, method, ms)
        record["extrapolated"] = method not in were_run
        if method in were_run and not arguments.no_peaks:
            sizes = {"classes": num_classes, "layouts": layout, "items": arguments.items}
            sizes |= {"features": arguments.features, "dtype": record["dtype"]}
            setting = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
            record["peak_mb"] = measured.peak_mb(method, __file__, *setting)
        records.append(record)
        ratio = f"{measured.ms['exact'] / ms:.1f}" if "exact" in measured.ms else None
        peak = None if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
        name = method if method in were_run else f"{method} (extrapolated)"
        print(row(f"{num_classes:,}", layout, name, f"{ms:,.1f}", ratio, peak), flush=True)
    for method, why in measured.left_out.items():
        records.append({**make_record(arguments, num_classes, layout, method, None), "left_out": why})
        print(row(f"{num_classes:,}", layout, method, f"left out: {why}", None, None), flush=True)
    return records


def make_record(arguments: argparse.Namespace, num_classes: int, layout: str, method: str, ms: float | None) -> dict:
    """The record of one line of the table, its peak not measured yet."""
    spec = LAYOUTS[layout]
    return {
        "method": method,
        "layout": layout,
        "classes": num_classes,
        "items": arguments.items,
        "features": arguments.features,
        "dtype": str(step_dtype(arguments)).removeprefix("torch."),
        "sampled": spec.num_sampled_classes,
        "shared": spec.num_shared_classes,
        "tails": spec.num_tails,
        "ms": ms,
        "peak_mb": None,
        "extrapolated": False,
    }


if __name__ == "__main__":
    main()
