"""Time and memory of a training step of a language model's output head: loss, backward, clipping and optimizer.

    python benchmarks/language_model.py --json language_model.json

N supervised tokens, a student's head of V tokens without bias, and a teacher of --teacher_width. Contexts are 64
normal numbers. Teacher and student are given fixed random projections of them and a constant. The teacher's head turns
these into logits: Zipf's marginals (-log r, r the token's frequency rank) plus normal ones. Their deviation is
1.5 (1 + r^-1/4), which is 3 for the commonest token and 1.5 for rare ones. That is a little more than in the logits of
run_clm.py's teacher on text, which `estimator_error.py --task lm` prints. The student's head starts at random, normal
with standard deviation 0.02. Two settings of the teacher:

given   its log-probabilities, ranking and class marginal are computed once, outside of the measurement
online  its features are given, and its head is applied within the step; for exact and dis by chunks that are dropped

Methods, all on the same tensors in turn; medians. The dense ones share one fused AdamW:

exact                 every logit, in blocks of items, by the library's exact loss, which computes gradients in forward
exact (materialised)  every logit, by F.kl_div and autograd; earlier tables call this method exact
trl_gkd               GKDTrainer.generalized_jsd_loss on every logit, if trl is installed
trl_chunked           ChunkedDivergenceFunction of TRL, in tiles; applies the teacher's head (online)
liger                 LigerFusedLinearJSDLoss, if liger-kernel is installed; applies the teacher's head (online)
liger_kl              LigerFusedLinearKLDivLoss, if liger-kernel is installed and has it; is given the teacher's
                      probabilities (given); forward KL alone
head_product          features @ W.T by chunks with both gradients, and no loss: a floor of the methods above
dis                   16 tokens per item and 1,024 for all items, row_sparse_head and RowSparseAdamW

--divergence is the loss of all methods: the forward KL (beta 0 of TRL and Liger), the reverse KL (beta 1), or the
Jensen-Shannon divergence with beta 0.5.

With --device the tensors are made on the device, and steps are timed by its events. By default the student's head then
runs in bfloat16 autocast: the weight and its moments are float32, and the teacher's head, features and given
log-probabilities are bfloat16. --dtype float32 turns this off. On a processor everything is float32 by default. For an
accelerator: --device cuda --tokens 8192 --vocab 151936 262144 --width 2048 --teacher_width 2048. A method that needs
too much memory is left out, with a line that says so.

error is the error of the gradient on the student's features, ‖ĝ-g‖²/‖g‖² against all tokens in the device's widest
type, float64 where it has one. It is measured on new contexts after 50 steps of DIS, mean of five samples. peak_mb is
the memory that a step takes beyond the memory in use between steps, measured as in head_scaling.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial

import peers
import torch
import torch.nn.functional as F
from common import EXACT_NOTE, command, header, machine, parse, parser, row, write
from head_scaling import ON_CPU, Place, finish_step
from peers import NEEDS
from timing import Measured, add_arguments, attempted, available, clock_name, measure, peak_of_a_step, step_dtype
from torch import Tensor

from hf_dis import DISLoss, RowSparseAdamW, SamplerSpec, make_sampler
from hf_dis.loss.exact_head import exact_head_loss
from hf_dis.loss.f_divergence import make_divergence
from hf_dis.precision import widest
from hf_dis.teacher.targets import TeacherTargets, chunk_items, widen

CONTEXT, TEACHER_WIDTH, SPREAD, WARM_STEPS, LEARNING_RATE = 64, 512, 1.5, 50, 5e-3
# TRL's and Liger's beta of each divergence.
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
# The one kind of teacher that a method can take.
TEACHER_OF = {"trl_chunked": "online", "liger": "online", "liger_kl": "given"}


def default_sample(vocab: int) -> SamplerSpec:
    """The default sample of a vocabulary; all sampled tokens update the head."""
    return SamplerSpec().resolved(vocab_size=vocab)


class Steps:
    """Training steps of a language model's head by each method, on the same tensors.

    Args:
        vocab, tokens, width: V, N and the student's width.
        teacher: ``"given"`` or ``"online"``.
        teacher_width: of the teacher.
        place: of the tensors.
        divergence: a key of ``BETAS``.
    """

    def __init__(
        self,
        vocab: int,
        tokens: int,
        width: int,
        teacher: str,
        teacher_width: int = TEACHER_WIDTH,
        place: Place = ON_CPU,
        divergence: str = "forward_kl",
    ):
        torch.manual_seed(0)
        self.vocab, self.tokens, self.teacher, self.place = vocab, tokens, teacher, place
        self.beta, self.divergence = BETAS[divergence], make_divergence(divergence)
        device = self.place.device
        self.chunk_items = chunk_items(tokens, vocab, torch.device(device))
        self.projections = [
            torch.randn(CONTEXT, size - 1, device=device) / CONTEXT**0.5 for size in (teacher_width, width)
        ]
        frequency_rank = torch.randperm(vocab, device=device)[:, None] + 1.0
        spread = SPREAD * (1 + frequency_rank**-0.25)
        teacher_weight = torch.randn(vocab, teacher_width, device=device) * spread / (teacher_width - 1) ** 0.5
        teacher_weight[:, :1] = -frequency_rank.log()
        self.teacher_weight = teacher_weight.to(self.place.dtype)
        self.weight = torch.nn.Parameter(0.02 * torch.randn(vocab, width, device=device))
        spec = default_sample(vocab)
        self.sampled = spec.num_sampled_classes
        sampler = make_sampler(vocab, spec, device=device)
        self.dis_loss = DISLoss(sampler, temperature=1.0, row_sparse_head=True, divergence=divergence)
        self.dense = torch.optim.AdamW([self.weight], lr=LEARNING_RATE, fused=True)
        self.sparse = RowSparseAdamW([self.weight], lr=LEARNING_RATE)
        self.labels = torch.zeros(tokens, dtype=torch.long, device=device)
        self.new_batch()

    def new_batch(self) -> None:
        """Samples new contexts, and with a given teacher its answers."""
        context = torch.randn(self.tokens, CONTEXT, device=self.place.device)
        teacher_features, self.features = (
            F.pad(context @ projection, (1, 0), value=1.0) for projection in self.projections
        )
        self.teacher_features = teacher_features.to(self.place.dtype)
        self.features.requires_grad_()
        if self.teacher == "given":
            log_probs = (widen(logits).log_softmax(1) for logits in self._stream())
            vars(self).pop("probabilities", None)
            self.log_probs = torch.cat([part.to(self.place.dtype) for part in log_probs])
            self.targets = [TeacherTargets(part, 1.0, self.sampled) for part in self.log_probs.split(self.chunk_items)]

    @cached_property
    def probabilities(self) -> Tensor:
        """The given teacher's probabilities, ``[N, V]``."""
        return self.log_probs.exp().to(self.place.dtype)  # autocast makes them float32

    def _teacher_logits(self) -> Tensor:
        return self.log_probs if self.teacher == "given" else self.teacher_features @ self.teacher_weight.T

    def _stream(self) -> Iterator[Tensor]:
        return (features @ self.teacher_weight.T for features in self.teacher_features.split(self.chunk_items))

    def _ranked(self) -> Iterable[TeacherTargets]:
        if self.teacher == "given":
            return self.targets
        return map(lambda logits: TeacherTargets(logits, 1.0, self.sampled), self._stream())

    def run(self, method: str) -> None:
        """One step: loss, backward, clipping, optimizer."""
        try:
            self.loss(method).backward()
            finish_step(self.weight, self.dense, self.sparse)
        finally:
            self.weight.grad = self.features.grad = None

    def loss(self, method: str) -> Tensor:
        """The loss of a method, a scalar."""
        with self.place.precision():
            return METHODS[method](self)

    def exact(self) -> Tensor:
        """All tokens, by the library."""
        chunks = (lambda: [self.log_probs]) if self.teacher == "given" else self._stream
        settings = chunks, None, 1.0, 0.0, self.divergence
        return exact_head_loss(self.features, self.weight, None, *settings)[0].mean()

    def materialised(self) -> Tensor:
        """All tokens, by autograd."""
        teacher = self._teacher_logits()
        if self.teacher == "online":
            teacher = widen(teacher).log_softmax(1)
        return divergence_of_logits(self.features @ self.weight.T, teacher, self.beta)

    def trl_gkd(self) -> Tensor:
        """All tokens, by TRL."""
        return peers.trl_gkd(self.features @ self.weight.T, self._teacher_logits(), self.labels, self.beta)

    def trl_chunked(self) -> Tensor:
        """All tokens, by TRL in tiles."""
        return peers.trl_chunked(self.features, self.weight, self.teacher_features, self.teacher_weight, self.beta)

    def liger(self) -> Tensor:
        """All tokens, by Liger, teacher's head included."""
        heads = self.features, self.weight, self.teacher_features, self.teacher_weight
        return peers.liger_jsd(*heads, self.labels, self.beta)

    def liger_kl(self) -> Tensor:
        """All tokens, by Liger, for given probabilities."""
        return peers.liger_kl(self.features.to(self.place.dtype), self.weight, self.probabilities)

    def head_product(self) -> Tensor:
        """The products alone."""
        return peers.head_product(self.features, self.weight)

    def dis(self) -> Tensor:
        """Sampled tokens, by the library."""
        return self.dis_loss.of_targets(self.features, self.weight, None, self._ranked())

    def error(self, samples: int = 5) -> float:
        """Squared relative error of the sampled gradient on the features, mean over samples for the same batch."""
        wide = widest(self.place.device)
        exact, start = torch.empty(self.features.shape, dtype=wide, device=self.place.device), 0
        weight = self.weight.detach().to(wide)
        for logits in self._stream():
            items = slice(start, start + len(logits))
            student = self.features[items].detach().to(wide) @ weight.T
            exact[items] = self.divergence.exact(student, logits.to(wide), 1.0)[1] @ weight
            start = items.stop
        total = 0.0
        for _ in range(samples):
            (sampled,) = torch.autograd.grad(self.loss("dis") * self.tokens, self.features)
            total += float((sampled - exact).square().sum() / exact.square().sum())
        return total / samples


def divergence_of_logits(logits: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The mean divergence over items by autograd in float32 or wider, for log-probabilities of the teacher."""
    student, teacher = widen(logits).log_softmax(1), widen(teacher)
    kl = partial(F.kl_div, reduction="batchmean", log_target=True)
    if beta in (0.0, 1.0):
        return kl(teacher, student) if beta else kl(student, teacher)
    mixed = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
    return beta * kl(mixed, teacher) + (1 - beta) * kl(mixed, student)


METHODS = {
    "exact": Steps.exact,
    "exact (materialised)": Steps.materialised,
    "trl_gkd": Steps.trl_gkd,
    "trl_chunked": Steps.trl_chunked,
    "liger": Steps.liger,
    "liger_kl": Steps.liger_kl,
    "head_product": Steps.head_product,
    "dis": Steps.dis,
}


def warm_error(make: Callable[[], Steps]) -> float:
    """The error of DIS on new contexts, after its class memory and head have seen 50 steps."""
    steps = make()
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
    made.add_argument("--teacher_width", type=int, default=TEACHER_WIDTH)
    made.add_argument("--teacher", choices=["given", "online"], nargs="+", default=["given", "online"])
    made.add_argument("--divergence", choices=list(BETAS), default="forward_kl")
    made.add_argument("--repeats", type=int, default=5)
    add_arguments(made, list(METHODS))
    return parse(made)


def make_steps(arguments: argparse.Namespace, vocab: int, width: int, teacher: str) -> Steps:
    """The steps of one size and teacher."""
    place = Place(arguments.device, step_dtype(arguments))
    return Steps(vocab, arguments.tokens, width, teacher, arguments.teacher_width, place, arguments.divergence)


def main() -> None:
    arguments = parse_arguments()
    if arguments.peak:
        steps = make_steps(arguments, arguments.vocab[0], arguments.width[0], arguments.teacher[0])
        print(peak_of_a_step(steps, arguments.peak, arguments.device))
        return
    methods = available(arguments.methods, NEEDS)
    about_times = f"{clock_name(arguments)}, median of {arguments.repeats}"
    print(f"{machine(arguments.device)}, N={arguments.tokens:,}; {about_times}")
    print(f"{EXACT_NOTE}\n")
    print(header("V", "width", "teacher", "method", "ms", "method / dis", "peak MB", "error"))
    records: list[dict] = []
    for vocab in arguments.vocab:
        for width in arguments.width:
            sizes = {"vocab": vocab, "tokens": arguments.tokens, "width": width}
            sizes |= {"teacher_width": arguments.teacher_width, "divergence": arguments.divergence}
            make = partial(make_steps, arguments, vocab, width)
            error = None
            if "dis" in methods:
                error, why = attempted(partial(warm_error, partial(make, "online")))
                if why:
                    print(f"the error at V={vocab:,} is left out: {why}")
            for teacher in arguments.teacher:
                here = [method for method in methods if takes(method, teacher, arguments.divergence)]
                measured = measure(
                    partial(make, teacher), here, arguments.repeats, arguments.device, arguments.cpu_time, peers=NEEDS
                )
                records += report(arguments, measured, {**sizes, "teacher": teacher}, error)
                write(records, arguments.json, arguments.device)


def takes(method: str, teacher: str, divergence: str) -> bool:
    """Returns True if a method can be measured with a kind of teacher and a divergence."""
    return TEACHER_OF.get(method, teacher) == teacher and (method != "liger_kl" or divergence == "forward_kl")


def report(
    arguments: argparse.Namespace, measured: Measured, sizes: dict[str, int | str], error: float | None
) -> list[dict]:
    """Prints the lines of one size and teacher, and measures their peaks; returns the records.

    Args:
        arguments: of the command line.
        measured: the times.
        sizes: options of this script, by name.
        error: of ``dis``.
    """
    sizes = {**sizes, "dtype": str(step_dtype(arguments)).removeprefix("torch.")}
    setting = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    records, sample = [], default_sample(sizes["vocab"])
    for method in [*measured.ms, *measured.left_out]:
        ms = measured.ms.get(method)
        record = {
            "method": method,
            "command": command(),
            **sizes,
            "sampled": sample.num_sampled_classes + sample.num_shared_classes if method == "dis" else sizes["vocab"],
            "ms": ms,
            "peak_mb": None if ms is None or arguments.no_peaks else measured.peak_mb(method, __file__, *setting),
            "error": {"dis": error, "head_product": None}.get(method, 0.0),
        }
        if ms is None:
            record |= {"left_out": measured.left_out[method], "error": None}
        records.append(record)
        print_record(record, measured.ms.get("dis"))
    return records


def print_record(record: dict, dis_ms: float | None) -> None:
    """Prints one line of the table."""
    setting = f"{record['vocab']:,}", record["width"], record["teacher"], record["method"]
    if record["ms"] is None:
        print(row(*setting, f"left out: {record['left_out']}", None, None, None), flush=True)
        return
    ratio = None if dis_ms is None else f"{record['ms'] / dis_ms:.1f}"
    peak = None if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
    error = None if record["error"] is None else f"{record['error']:.4f}"
    print(row(*setting, f"{record['ms']:,.1f}", ratio, peak, error), flush=True)


if __name__ == "__main__":
    main()
