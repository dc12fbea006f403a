"""Time and memory of a training step of the output head by the number of classes: loss, backward, clipping, optimizer.

    python benchmarks/head_scaling.py --json head_scaling.json

The features are random, the head is random and has no bias, and the teacher's answers are given: its logits, ranking
and class marginal are computed once, outside of the measurement. All methods step the same weight in turn; the times
are medians. The dense methods share one fused AdamW. Methods:

exact                 every logit, the library's own exact loss, whose gradient is computed in forward
exact (materialised)  every logit, KL divergence by F.kl_div and autograd; earlier tables call this method exact
chunked_exact         the same by chunks of 32 items, each with its backward at once: no [N, C] outlives a chunk
liger                 LigerFusedLinearJSDLoss with beta 0, if liger-kernel is installed, teacher head included
partial_fc            a uniform tenth of the classes for all items, softmax over these; RowSparseAdamW
dis_dense             DIS with a dense gradient
dis_row_sparse        DIS with row_sparse_head and RowSparseAdamW

exact normalises the teacher's logits in each step; the other exact methods are given log-probabilities.

peak_mb is the memory that a step takes beyond the memory in use between steps (weight, moments, teacher's answers):
the highest resident size over two steps, in a fresh process for each method, less the resident size before them.
Linux only. Beyond --dense_up_to classes the methods with a dense gradient are not run; exact is extrapolated in
proportion to C.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from common import EXACT_NOTE, header, machine, parser, row, write
from timing import add_arguments, available, clock, milliseconds, peak_mb, peak_of_a_step
from torch import Tensor

from hf_dis import DISLoss, RowSparseAdamW, SamplerSpec, make_sampler
from hf_dis.distributed.sums import average_rows
from hf_dis.head.row_gradients import clip_grad_norm_
from hf_dis.loss.exact import exact_loss
from hf_dis.teacher.targets import TeacherTargets

TEMPERATURE, ITEMS, FEATURES, CHUNK_ITEMS, PARTIAL_FC_SHARE = 2.0, 128, 256, 32, 0.1
LAYOUTS = {
    "default": SamplerSpec(num_sampled_classes=32, num_shared_classes=512, num_tails=4, num_updated_classes=16),
    "per item": SamplerSpec(num_sampled_classes=128, num_shared_classes=0, num_tails=1),
}


class GivenTargets(TeacherTargets):
    """A teacher's answers, all of them computed beforehand; arguments as for ``TeacherTargets``."""

    def __init__(self, logits: Tensor, temperature: float, depth: int):
        super().__init__(logits, temperature, depth)
        self.mass = super().class_mass()

    def class_mass(self) -> Tensor:
        """The class marginal, computed at construction."""
        return self.mass


class RankedLoss(DISLoss):
    """The library's sampled step for a teacher whose answers are ranked already; call it with targets, not logits."""

    def _ranked(self, chunks: Iterable[TeacherTargets], check_finite: bool) -> Iterable[TeacherTargets]:
        return chunks


def kl_divergence(logits: Tensor, log_probs: Tensor, temperature: float, reduction: str = "batchmean") -> Tensor:
    """τ² KL by autograd, for log-probabilities of the teacher at the temperature, ``[N, C]``."""
    student = (logits / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(student, log_probs, reduction=reduction, log_target=True)


class Steps:
    """Training steps of a head by each method, on the same tensors.

    Args:
        num_classes: C.
        layout: a key of ``LAYOUTS``.
    """

    def __init__(self, num_classes: int, layout: str):
        torch.manual_seed(0)
        self.num_classes = num_classes
        self.features = torch.randn(ITEMS, FEATURES, requires_grad=True)
        self.weight = torch.nn.Parameter(torch.randn(num_classes, FEATURES) / FEATURES**0.5)
        self.teacher_logits = 3 * torch.randn(ITEMS, num_classes)
        spec = LAYOUTS[layout]
        sampler, dense_sampler = (
            make_sampler(num_classes, one) for one in (spec, replace(spec, num_updated_classes=None))
        )
        self.targets = GivenTargets(self.teacher_logits, TEMPERATURE, sampler.rank_depth)
        self.row_sparse_loss = RankedLoss(sampler, TEMPERATURE, row_sparse_head=True)
        self.dense_loss = RankedLoss(dense_sampler, TEMPERATURE)
        self.dense = torch.optim.AdamW([self.weight], lr=1e-3, fused=True)
        self.sparse = RowSparseAdamW([self.weight], lr=1e-3)

    @cached_property
    def log_probs(self) -> Tensor:
        """The teacher's log-probabilities at the temperature, ``[N, C]``."""
        return (self.teacher_logits / TEMPERATURE).log_softmax(1)

    def run(self, method: str) -> None:
        """One step: loss, backward, clipping, optimizer."""
        METHODS[method](self)
        optimizer = self.dense
        if self.weight.grad.is_sparse:
            average_rows([self.weight])  # over one process: as in the trainer, each row once
            optimizer = self.sparse
        clip_grad_norm_([self.weight], 1.0)
        optimizer.step()
        self.weight.grad = self.features.grad = None

    def exact(self) -> None:
        """All classes, by the library."""
        logits = self.features @ self.weight.T
        loss, _ = exact_loss(logits, self.num_classes, [self.teacher_logits], None, TEMPERATURE, 0.0)
        loss.mean().backward()

    def materialised(self) -> None:
        """All classes, by autograd."""
        kl_divergence(self.features @ self.weight.T, self.log_probs, TEMPERATURE).backward()

    def chunked_exact(self) -> None:
        """All classes by autograd, chunk by chunk."""
        chunks = zip(self.features.split(CHUNK_ITEMS), self.log_probs.split(CHUNK_ITEMS), strict=True)
        for features, log_probs in chunks:
            loss = kl_divergence(features @ self.weight.T, log_probs, TEMPERATURE, reduction="sum")
            (loss / ITEMS).backward()

    def liger(self) -> None:
        """All classes, by Liger."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=False
        )
        labels = torch.zeros(ITEMS, dtype=torch.long)
        teacher = self.weight.detach()
        loss(self.features, self.weight, self.features.detach(), teacher, labels).backward()

    def partial_fc(self) -> None:
        """A uniform share of the classes."""
        sampled = torch.randperm(self.num_classes)[: int(PARTIAL_FC_SHARE * self.num_classes)]
        rows = F.embedding(sampled, self.weight, sparse=True)
        log_probs = self.log_probs[:, sampled].log_softmax(1)
        kl_divergence(self.features @ rows.T, log_probs, TEMPERATURE).backward()

    def dis_dense(self) -> None:
        """Sampled classes, by the library, with a dense gradient."""
        self.dense_loss(self.features, self.weight, None, [self.targets]).backward()

    def dis_row_sparse(self) -> None:
        """Sampled classes, by the library, with a row-sparse gradient."""
        self.row_sparse_loss(self.features, self.weight, None, [self.targets]).backward()


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

# The packages that must be installed.
NEEDS = {"liger": "liger_kernel"}


def extrapolated(records: list[dict], num_classes: int) -> float | None:
    """Milliseconds of exact at more classes than were run, in proportion from the most that were."""
    exact = [record for record in records if record["method"] == "exact" and not record["extrapolated"]]
    most = max(exact, key=lambda record: record["classes"], default=None)
    return None if most is None else most["ms"] * num_classes / most["classes"]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--classes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    made.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    made.add_argument("--dense_up_to", type=int, default=300_000, help="classes; exact at 300,000 takes 2 GB")
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--no_peaks", action="store_true", help="times only")
    add_arguments(made, list(METHODS))
    return made.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.peak:
        print(peak_of_a_step(Steps(arguments.classes[0], arguments.layouts[0]), arguments.peak))
        return
    methods = available(arguments.methods, NEEDS)
    kind, now = clock(arguments.cpu_time)
    print(f"{kind}; {machine()}")
    print(f"{EXACT_NOTE}\n")
    print(header("C", "layout", "method", "ms", "exact / method", "peak MB"))
    records: list[dict] = []
    for layout in arguments.layouts:
        for num_classes in arguments.classes:
            too_many = num_classes > arguments.dense_up_to
            here = [method for method in methods if not (too_many and method in DENSE)]
            times = milliseconds(Steps(num_classes, layout), here, arguments.repeats, now)
            if too_many and "exact" in methods and (guess := extrapolated(records, num_classes)):
                times = {"exact": guess, **times}
            for method, ms in times.items():
                record = make_record(num_classes, layout, method, ms, was_run=method in here)
                if method in here and not arguments.no_peaks:
                    setting = ["--classes", str(num_classes), "--layouts", layout]
                    record["peak_mb"] = peak_mb(__file__, method, *setting)
                records.append(record)
                ratio = f"{times['exact'] / ms:.1f}" if "exact" in times else None
                peak = None if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
                name = method if method in here else f"{method} (extrapolated)"
                print(row(f"{num_classes:,}", layout, name, f"{ms:,.1f}", ratio, peak), flush=True)
    write(records, arguments.json)


def make_record(num_classes: int, layout: str, method: str, ms: float, was_run: bool) -> dict:
    """The record of one line of the table, its peak not measured yet."""
    spec = LAYOUTS[layout]
    return {
        "method": method,
        "layout": layout,
        "classes": num_classes,
        "items": ITEMS,
        "features": FEATURES,
        "sampled": spec.num_sampled_classes,
        "shared": spec.num_shared_classes,
        "tails": spec.num_tails,
        "ms": ms,
        "peak_mb": None,
        "extrapolated": not was_run,
    }


if __name__ == "__main__":
    main()
