"""What a training step of a language model's output head costs: loss, backward, clipping and optimizer.

    python benchmarks/language_model.py --json language_model.json

N supervised tokens, a student's head of V tokens without bias, and a teacher of width 512. What is sampled: contexts are
64 normal numbers; teacher and student are given fixed random projections of them and a constant, from which the
teacher's head makes logits with Zipf's marginals (-log r, r the token's frequency rank) plus normal ones of standard
deviation 1.5 (1 + r^-1/4): 3 for the commonest token and 1.5 for the rare ones, a little more than those of
run_clm.py's teacher on text, which `estimator_error.py --task lm` prints. The student's head starts at random, normal
with standard deviation 0.02. Two settings of the teacher:

given   its log-probabilities, ranking and class marginal are computed once, outside of what is measured
online  its features are given, and its head is applied within the step; for DIS by chunks that are ranked and dropped

Methods, all on the same tensors in turn; medians. The dense ones share one fused AdamW:

exact    every logit, KL divergence by F.kl_div
trl_gkd  GKDTrainer.generalized_jsd_loss with beta 0 on every logit, if trl is installed
liger    LigerFusedLinearJSDLoss with beta 0, if liger-kernel is installed; it always applies the teacher's head
dis      16 tokens a row and 1,024 for all of them, row_sparse_head and RowSparseAdamW

error is that of the gradient on the student's features, ‖ĝ-g‖²/‖g‖² against float64 and all tokens, on contexts of
their own after 50 steps of DIS, mean of five samples. peak_mb is what a step takes beyond what lies there between steps,
measured as in head_scaling.py: the highest resident size over two steps, in a fresh process, less the one before them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from head_scaling import milliseconds, peak_mb, peak_of_a_step
from torch import Tensor

from hf_dis import SamplerSpec, RowSparseAdamW, make_sampler
from hf_dis.distributed.sums import average_rows
from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.teacher.stream import CHUNK_ELEMENTS
from hf_dis.teacher.targets import TeacherTargets

CONTEXT, TEACHER_WIDTH, SPREAD, WARM_STEPS, LEARNING_RATE = 64, 512, 1.5, 50, 5e-3
SAMPLED, SHARED = 16, 1024
METHODS = ["exact", "trl_gkd", "liger", "dis"]
NEEDS = {"trl_gkd": "trl", "liger": "liger_kernel"}


class Steps:
    """Training steps of a language model's head by each method, on the same tensors.

    Args:
        vocab, tokens, width: V, N and the student's width.
        teacher: ``"given"`` or ``"online"``.
    """

    def __init__(self, vocab: int, tokens: int, width: int, teacher: str):
        torch.manual_seed(0)
        self.tokens, self.teacher = tokens, teacher
        self.chunk_items = max(1, CHUNK_ELEMENTS // vocab)
        self.projections = [torch.randn(CONTEXT, size - 1) / CONTEXT**0.5 for size in (TEACHER_WIDTH, width)]
        frequency_rank = torch.randperm(vocab)[:, None] + 1.0
        spread = SPREAD * (1 + frequency_rank**-0.25)
        self.teacher_weight = torch.randn(vocab, TEACHER_WIDTH) * spread / (TEACHER_WIDTH - 1) ** 0.5
        self.teacher_weight[:, :1] = -frequency_rank.log()
        self.weight = torch.nn.Parameter(0.02 * torch.randn(vocab, width))
        self.sampler = make_sampler(vocab, SamplerSpec(num_sampled_classes=SAMPLED, num_shared_classes=SHARED, num_tails=4, rank_depth=SAMPLED))
        self.dense = torch.optim.AdamW([self.weight], lr=LEARNING_RATE, fused=True)
        self.sparse = RowSparseAdamW([self.weight], lr=LEARNING_RATE)
        self.labels = torch.zeros(tokens, dtype=torch.long)
        self.new_batch()

    def new_batch(self) -> None:
        """Samples contexts anew, and with a given teacher its answers."""
        context = torch.randn(self.tokens, CONTEXT)
        self.teacher_features, self.features = (
            F.pad(context @ projection, (1, 0), value=1.0) for projection in self.projections
        )
        self.features.requires_grad_()
        if self.teacher == "given":
            self.log_probs = torch.cat([logits.log_softmax(1) for logits in self._stream()])
            self.targets = [TeacherTargets(part, 1.0, SAMPLED) for part in self.log_probs.split(self.chunk_items)]

    def _teacher_logits(self) -> Tensor:
        return self.log_probs if self.teacher == "given" else self.teacher_features @ self.teacher_weight.T

    def _stream(self) -> Iterator[Tensor]:
        return (features @ self.teacher_weight.T for features in self.teacher_features.split(self.chunk_items))

    def _ranked(self) -> Iterable[TeacherTargets]:
        if self.teacher == "given":
            return self.targets
        return map(lambda logits: TeacherTargets(logits, 1.0, SAMPLED), self._stream())

    def run(self, method: str) -> None:
        """One step: loss, backward, clipping, optimizer."""
        getattr(self, method)().backward()
        optimizer = self.dense
        if self.weight.grad.is_sparse:
            average_rows([self.weight])  # over one process: as the trainer does it, each row once
            optimizer = self.sparse
        torch.nn.utils.clip_grad_norm_([self.weight], 1.0)
        optimizer.step()
        self.weight.grad = self.features.grad = None

    def exact(self) -> Tensor:
        teacher = self._teacher_logits()
        if self.teacher == "online":
            teacher = teacher.log_softmax(1)
        student = (self.features @ self.weight.T).log_softmax(1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def trl_gkd(self) -> Tensor:
        from trl.experimental.gkd import GKDTrainer

        student, teacher = self.features @ self.weight.T, self._teacher_logits()
        return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], self.labels[None], beta=0)

    def liger(self) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
        return loss(self.features, self.weight, self.teacher_features, self.teacher_weight, self.labels)

    def dis(self) -> Tensor:
        with torch.no_grad():
            sample = self.sampler.sample(self._ranked())
        logits = sampled_logits(self.features, self.weight, None, sample.item_ids, sample.tail_ids, True)
        loss, signal = sampled_forward_kl(logits, sample, 1.0)
        self.sampler.learn(sample, signal)
        return loss.mean()

    def error(self, samples: int = 5) -> float:
        """Squared relative error of the sampled gradient on the features, mean over samples for the same batch."""
        exact, start = torch.empty(self.features.shape, dtype=torch.float64), 0
        weight = self.weight.detach().double()
        for logits in self._stream():
            rows = slice(start, start + len(logits))
            student = (self.features[rows].detach().double() @ weight.T).softmax(1)
            exact[rows] = (student - logits.double().softmax(1)) @ weight
            start = rows.stop
        total = 0.0
        for _ in range(samples):
            (sampled,) = torch.autograd.grad(self.dis() * self.tokens, self.features)
            total += float((sampled - exact).square().sum() / exact.square().sum())
        return total / samples


def warm_error(vocab: int, tokens: int, width: int) -> float:
    """The error of DIS on new contexts, after its class memory and head have seen 50 steps."""
    steps = Steps(vocab, tokens, width, "online")
    for _ in range(WARM_STEPS):
        steps.run("dis")
        steps.new_batch()
    return steps.error()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 50_257, 151_936])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--teacher", choices=["given", "online"], nargs="+", default=["given", "online"])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cpu_time", action="store_true", help="processor time of all threads, where other work runs beside"
    )
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument("--peak", choices=METHODS, help="print the peak of one method's step, and nothing else")
    arguments = parser.parse_args()
    tokens = arguments.tokens
    if arguments.peak:
        steps = Steps(arguments.vocab[0], tokens, arguments.width[0], arguments.teacher[0])
        print(peak_of_a_step(steps, arguments.peak))
        return
    missing = {method for method, package in NEEDS.items() if importlib.util.find_spec(package) is None}
    for method in missing & set(arguments.methods):
        print(f"{method} is left out: {NEEDS[method]} is not installed")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    kind = "processor time" if arguments.cpu_time else "time"
    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}, N={tokens:,}; {kind}, median of {arguments.repeats}\n")
    print("| V | width | teacher | method | ms | method / dis | peak MB | error |")
    print("|---|---|---|---|---|---|---|---|")
    records: list[dict] = []
    for vocab in arguments.vocab:
        for width in arguments.width:
            error = warm_error(vocab, tokens, width) if "dis" in arguments.methods else None
            for teacher in arguments.teacher:
                left_out = missing | ({"liger"} if teacher == "given" else set())
                methods = [method for method in arguments.methods if method not in left_out]
                times = milliseconds(Steps(vocab, tokens, width, teacher), methods, arguments.repeats, clock)
                sizes = {"--vocab": vocab, "--tokens": tokens, "--width": width, "--teacher": teacher}
                setting = [str(part) for pair in sizes.items() for part in pair]
                for method, ms in times.items():
                    record = {
                        "method": method,
                        "vocab": vocab,
                        "tokens": tokens,
                        "width": width,
                        "teacher": teacher,
                        "sampled": SAMPLED + SHARED if method == "dis" else vocab,
                        "ms": ms,
                        "peak_mb": peak_mb(__file__, method, *setting),
                        "error": error if method == "dis" else 0.0,
                    }
                    records.append(record)
                    ratio = f"{ms / times['dis']:.1f}" if "dis" in times else ""
                    peak = "" if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
                    print(
                        f"| {vocab:,} | {width} | {teacher} | {method} | {ms:,.0f} | {ratio} | {peak} "
                        f"| {record['error']:.4f} |",
                        flush=True,
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
