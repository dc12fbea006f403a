"""Time and memory of a training step of a language model's output head: loss, backward, clipping and optimizer.

    python benchmarks/language_model.py --json language_model.json

N supervised tokens, a student's head of V tokens without bias, and a teacher of width 512. Contexts are 64 normal
numbers. Teacher and student are given fixed random projections of them and a constant. The teacher's head turns these
into logits with Zipf's marginals (-log r, r the token's frequency rank) plus normal ones of standard deviation
1.5 (1 + r^-1/4): 3 for the commonest token and 1.5 for the rare ones. That is a little more than in the logits of
run_clm.py's teacher on text, which `estimator_error.py --task lm` prints. The student's head starts at random, normal
with standard deviation 0.02. Two settings of the teacher:

given   its log-probabilities, ranking and class marginal are computed once, outside of the measurement
online  its features are given, and its head is applied within the step; for exact and dis by chunks that are dropped

Methods, all on the same tensors in turn; medians. The dense ones share one fused AdamW:

exact                 every logit, the library's own exact loss, whose gradient is computed in forward
exact (materialised)  every logit, KL divergence by F.kl_div and autograd; earlier tables call this method exact
trl_gkd               GKDTrainer.generalized_jsd_loss with beta 0 on every logit, if trl is installed
liger                 LigerFusedLinearJSDLoss with beta 0, if liger-kernel is installed; applies the teacher's head
dis                   16 tokens per item and 1,024 for all items, row_sparse_head and RowSparseAdamW

error is the error of the gradient on the student's features, ‖ĝ-g‖²/‖g‖² against float64 and all tokens, on new
contexts after 50 steps of DIS, mean of five samples. peak_mb is the memory that a step takes beyond the memory in use
between steps, measured as in head_scaling.py: the highest resident size over two steps, in a fresh process, less the
resident size before them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from common import EXACT_NOTE, header, machine, parser, row, write
from head_scaling import RankedLoss, kl_divergence
from timing import add_arguments, available, clock, milliseconds, peak_mb, peak_of_a_step
from torch import Tensor

from hf_dis import RowSparseAdamW, SamplerSpec, make_sampler
from hf_dis.distributed.sums import average_rows
from hf_dis.loss.exact import exact_loss
from hf_dis.teacher.targets import CHUNK_ELEMENTS, TeacherTargets

CONTEXT, TEACHER_WIDTH, SPREAD, WARM_STEPS, LEARNING_RATE = 64, 512, 1.5, 50, 5e-3
SAMPLED, SHARED = 16, 1024
SPEC = SamplerSpec(num_sampled_classes=SAMPLED, num_shared_classes=SHARED, num_tails=4, rank_depth=SAMPLED)
# The packages that must be installed.
NEEDS = {"trl_gkd": "trl", "liger": "liger_kernel"}


class Steps:
    """Training steps of a language model's head by each method, on the same tensors.

    Args:
        vocab, tokens, width: V, N and the student's width.
        teacher: ``"given"`` or ``"online"``.
    """

    def __init__(self, vocab: int, tokens: int, width: int, teacher: str):
        torch.manual_seed(0)
        self.vocab, self.tokens, self.teacher = vocab, tokens, teacher
        self.chunk_items = max(1, CHUNK_ELEMENTS // vocab)
        self.projections = [torch.randn(CONTEXT, size - 1) / CONTEXT**0.5 for size in (TEACHER_WIDTH, width)]
        frequency_rank = torch.randperm(vocab)[:, None] + 1.0
        spread = SPREAD * (1 + frequency_rank**-0.25)
        self.teacher_weight = torch.randn(vocab, TEACHER_WIDTH) * spread / (TEACHER_WIDTH - 1) ** 0.5
        self.teacher_weight[:, :1] = -frequency_rank.log()
        self.weight = torch.nn.Parameter(0.02 * torch.randn(vocab, width))
        self.dis_loss = RankedLoss(make_sampler(vocab, SPEC), temperature=1.0, row_sparse_head=True)
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
        METHODS[method](self).backward()
        optimizer = self.dense
        if self.weight.grad.is_sparse:
            average_rows([self.weight])  # over one process: as in the trainer, each row once
            optimizer = self.sparse
        torch.nn.utils.clip_grad_norm_([self.weight], 1.0)
        optimizer.step()
        self.weight.grad = self.features.grad = None

    def exact(self) -> Tensor:
        """All tokens, by the library."""
        chunks = [self.log_probs] if self.teacher == "given" else self._stream()
        return exact_loss(self.features @ self.weight.T, self.vocab, chunks, None, 1.0, 0.0)[0].mean()

    def materialised(self) -> Tensor:
        """All tokens, by autograd."""
        teacher = self._teacher_logits()
        if self.teacher == "online":
            teacher = teacher.log_softmax(1)
        return kl_divergence(self.features @ self.weight.T, teacher, temperature=1.0)

    def trl_gkd(self) -> Tensor:
        """All tokens, by TRL."""
        from trl.experimental.gkd import GKDTrainer

        student, teacher = self.features @ self.weight.T, self._teacher_logits()
        return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], self.labels[None], beta=0)

    def liger(self) -> Tensor:
        """All tokens, by Liger."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
        return loss(self.features, self.weight, self.teacher_features, self.teacher_weight, self.labels)

    def dis(self) -> Tensor:
        """Sampled tokens, by the library."""
        return self.dis_loss(self.features, self.weight, None, self._ranked())

    def error(self, samples: int = 5) -> float:
        """Squared relative error of the sampled gradient on the features, mean over samples for the same batch."""
        exact, start = torch.empty(self.features.shape, dtype=torch.float64), 0
        weight = self.weight.detach().double()
        for logits in self._stream():
            items = slice(start, start + len(logits))
            student = (self.features[items].detach().double() @ weight.T).softmax(1)
            exact[items] = (student - logits.double().softmax(1)) @ weight
            start = items.stop
        total = 0.0
        for _ in range(samples):
            (sampled,) = torch.autograd.grad(self.dis() * self.tokens, self.features)
            total += float((sampled - exact).square().sum() / exact.square().sum())
        return total / samples


METHODS = {
    "exact": Steps.exact,
    "exact (materialised)": Steps.materialised,
    "trl_gkd": Steps.trl_gkd,
    "liger": Steps.liger,
    "dis": Steps.dis,
}


def warm_error(vocab: int, tokens: int, width: int) -> float:
    """The error of DIS on new contexts, after its class memory and head have seen 50 steps."""
    steps = Steps(vocab, tokens, width, "online")
    for _ in range(WARM_STEPS):
        steps.run("dis")
        steps.new_batch()
    return steps.error()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--vocab", type=int, nargs="+", default=[32_000, 50_257, 151_936])
    made.add_argument("--tokens", type=int, default=2048)
    made.add_argument("--width", type=int, nargs="+", default=[256, 512])
    made.add_argument("--teacher", choices=["given", "online"], nargs="+", default=["given", "online"])
    made.add_argument("--repeats", type=int, default=5)
    add_arguments(made, list(METHODS))
    return made.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokens = arguments.tokens
    if arguments.peak:
        steps = Steps(arguments.vocab[0], tokens, arguments.width[0], arguments.teacher[0])
        print(peak_of_a_step(steps, arguments.peak))
        return
    methods = available(arguments.methods, NEEDS)
    kind, now = clock(arguments.cpu_time)
    print(f"{machine()}, N={tokens:,}; {kind}, median of {arguments.repeats}")
    print(f"{EXACT_NOTE}\n")
    print(header("V", "width", "teacher", "method", "ms", "method / dis", "peak MB", "error"))
    records: list[dict] = []
    for vocab in arguments.vocab:
        for width in arguments.width:
            error = warm_error(vocab, tokens, width) if "dis" in methods else None
            for teacher in arguments.teacher:
                here = [method for method in methods if method != "liger" or teacher == "online"]
                times = milliseconds(Steps(vocab, tokens, width, teacher), here, arguments.repeats, now)
                for method, ms in times.items():
                    records.append(make_record(method, vocab, tokens, width, teacher, ms, error))
                    ratio = f"{ms / times['dis']:.1f}" if "dis" in times else None
                    print_record(records[-1], ratio)
    write(records, arguments.json)


def make_record(
    method: str, vocab: int, tokens: int, width: int, teacher: str, ms: float, error: float | None
) -> dict:
    """The record of one line of the table; measures the peak memory of the method."""
    sizes = {"--vocab": vocab, "--tokens": tokens, "--width": width, "--teacher": teacher}
    setting = [str(part) for pair in sizes.items() for part in pair]
    return {
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


def print_record(record: dict, ratio: str | None) -> None:
    """Prints one line of the table."""
    peak = None if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
    setting = f"{record['vocab']:,}", record["width"], record["teacher"], record["method"]
    print(row(*setting, f"{record['ms']:,.0f}", ratio, peak, f"{record['error']:.4f}"), flush=True)


if __name__ == "__main__":
    main()
