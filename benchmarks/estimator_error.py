"""How far the sampled gradient is from the exact one: every proposal and sampler, on the glyph task and on text.

    python benchmarks/estimator_error.py --teacher runs/glyphs/teacher --json estimator_error.json
    python benchmarks/estimator_error.py --task lm --teacher runs/clm/_teacher --json estimator_error_lm.json

A student is distilled exactly, without labels: glyphs at temperature 2 in batches of 256, or the tokens of
run_clm.py's texts at temperature 1 in batches of 512. At some steps each method samples classes many times for the same
128 rows (512 tokens); error is E‖ĝ - g‖² / ‖g‖² of the gradient on the features, error_head the same on the head's
weights, bias2 the part of error that no number of samples averages away. What a method learns, it learns from its own
samples at every training step; before step 0 it sees 20 batches of the untrained student.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, ResNetForImageClassification

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import clm_task
import glyph_task

from hf_dis import SamplerSpec, ClassSampler, make_sampler
from hf_dis.head.sampled_linear import sampled_columns, sampled_logits
from hf_dis.loss.divergence import exact_distillation_loss, sampled_forward_kl
from hf_dis.sampling.proposal import Proposal
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.targets import TeacherTargets

WARM_UP_BATCHES = 20


class OracleProposal(Proposal):
    """q ∝ |s - p|, which needs every student logit: what no proposal over ranks or classes can beat by much."""

    def look(self, signal: Tensor, targets: TeacherTargets) -> None:
        """Sees the whole ``s - p [N, C]`` of the rows it is to sample for."""
        self.signal = signal.abs()
        self.outside_top = self.signal.scatter(1, targets.ids, 0)

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        density = self.signal.gather(1, targets.ids).double()
        return 0.95 * density / density.sum(1, keepdim=True) + 0.05 / self.num_ranks

    def class_density(self) -> Tensor:
        density = self.outside_top.double().square().sum(0).sqrt()
        return 0.95 * density / density.sum() + 0.05 / self.num_classes


@dataclass
class Method:
    """A proposal, a sampler and a layout; ``depth`` None resolves every rank, ``updated`` None updates all sampled."""

    proposal: str
    sampler: str
    sampled: int
    shared: int = 0
    depth: int | None = None
    tails: int = 1
    updated: int | None = None
    drawer: ClassSampler = field(init=False)

    def build(self, num_classes: int) -> None:
        depth = self.depth or num_classes
        if self.proposal == "oracle":
            proposal = OracleProposal(num_classes, depth if self.shared else num_classes, depth)
            self.drawer = ClassSampler(
                proposal, num_classes, self.sampled, self.shared, self.tails, depth, self.sampler
            )
        else:
            self.drawer = self.sampler_of(num_classes, self.proposal)

    def sampler_of(self, num_classes: int, proposal: str) -> ClassSampler:
        """The library's, in this layout."""
        return make_sampler(num_classes, SamplerSpec(num_sampled_classes=self.sampled, num_shared_classes=self.shared, num_tails=self.tails, num_updated_classes=self.updated, rank_depth=self.depth or num_classes, proposal=proposal, design="pps" if self.sampler == "none" else self.sampler))

    def rows_touched(self, num_items: int) -> int:
        """Items of W in a step's gradient, at most."""
        sampled = num_items * self.sampled + self.tails * self.shared
        return sampled if self.updated is None else min(sampled, num_items * self.updated)

    def sample(self, teacher_logits: Tensor, signal: Tensor, temperature: float) -> ClassSample:
        targets = TeacherTargets(teacher_logits, temperature, self.drawer.rank_depth)
        if self.proposal == "oracle":
            self.drawer.proposal.look(signal, targets)
        return self.drawer.sample([targets])

    def learn(self, teacher_logits: Tensor, logits: Tensor, temperature: float) -> None:
        if self.proposal == "dis" or (self.proposal == "teacher" and self.shared):
            self.learn_from(self.sample(teacher_logits, logits, temperature), logits, temperature)

    def learn_from(self, sample: ClassSample, logits: Tensor, temperature: float) -> None:
        columns = sampled_columns(logits, sample.item_ids, sample.tail_ids)
        self.drawer.learn(sample, sampled_forward_kl(columns, sample, temperature)[1])


@dataclass
class Task:
    """Teacher, student and batches, and when to measure which methods."""

    teacher: nn.Module
    student: nn.Module
    head: nn.Linear
    batches: Callable[[int, torch.Generator], Iterator[dict[str, Tensor]]]
    batch_size: int
    measured_size: int
    temperature: float
    learning_rate: float
    steps: tuple[int, ...]
    num_sampled: int
    methods: list[Method]


def glyphs(arguments: argparse.Namespace) -> Task:
    train_dataset, _, names = glyph_task.load_task()
    if arguments.teacher:
        teacher = ResNetForImageClassification.from_pretrained(arguments.teacher)
    else:
        teacher = glyph_task.build_teacher(len(names))
        glyph_task.train_teacher(teacher, train_dataset, arguments.teacher_epochs, "runs/estimator_error/teacher")
    student = glyph_task.build_student(len(names))

    def batches(num_images: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        while True:
            index = torch.randint(len(train_dataset), (num_images,), generator=generator)
            yield {"pixel_values": glyph_task.augment(train_dataset.images[index])}

    return Task(
        teacher=teacher,
        student=student,
        head=student.classifier[-1],
        batches=batches,
        batch_size=256,
        measured_size=128,
        temperature=2.0,
        learning_rate=3e-3,
        steps=(0, 100, 480),
        num_sampled=40,
        methods=glyph_methods(),
    )


def lm(arguments: argparse.Namespace) -> Task:
    if arguments.teacher is None:
        raise SystemExit("--task lm needs --teacher: examples/run_clm.py keeps the one it trains in _teacher")
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    tokens = clm_task.tokenized(clm_task.load_texts(), tokenizer, 128)["train"].with_format("torch")["input_ids"][:]
    student = clm_task.build_student(len(tokenizer))

    def batches(num_blocks: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        while True:
            yield {"input_ids": tokens[torch.randint(len(tokens), (num_blocks,), generator=generator)]}

    return Task(
        teacher=AutoModelForCausalLM.from_pretrained(arguments.teacher),
        student=student,
        head=student.lm_head,
        batches=batches,
        batch_size=4,
        measured_size=4,
        temperature=1.0,
        learning_rate=2e-3,
        steps=(0, 40, 80, 160),
        num_sampled=10,
        methods=lm_methods(),
    )


def lm_methods() -> list[Method]:
    """The layout of language models with every density of the tail, and other sizes of it."""
    return (
        [Method(proposal, "pps", 16, 1024, 16) for proposal in ("dis", "teacher", "uniform", "oracle")]
        + [
            Method("dis", "pps", sampled, shared, depth)
            for sampled, shared, depth in ((16, 256, 16), (16, 4096, 16), (8, 1024, 8), (64, 1024, 64), (32, 1024, 64))
        ]
        + [Method("dis", "pps", 16, shared, 16, tails=4) for shared in (1024, 4096)]
    )


def glyph_methods() -> list[Method]:
    """Every proposal and sampler row by row, and with tails that rows share."""
    per_row = [
        Method(proposal, sampler, sampled)
        for sampled in (32, 128)
        for proposal, sampler in (
            ("dis", "pps"),
            ("dis", "replacement"),
            ("teacher", "pps"),
            ("teacher", "replacement"),
            ("uniform", "pps"),
            ("uniform", "replacement"),
            ("topk", "none"),
            ("oracle", "pps"),
            ("oracle", "replacement"),
        )
    ]
    two_strata = [
        Method(proposal, "pps", sampled, shared, depth)
        for depth, sampled, shared in ((64, 32, 256), (64, 32, 512), (256, 64, 256), (256, 96, 512))
        for proposal in ("dis", "uniform")
    ]
    several_tails = [
        Method("dis", "pps", sampled, shared, 2 * sampled, tails)
        for sampled, shared, tails in ((32, 256, 8), (32, 512, 4), (32, 512, 8), (64, 256, 16), (64, 512, 4))
    ]
    updated = [
        Method("dis", "pps", 128, updated=16),
        Method("dis", "pps", 32, 512, 64, 4, 16),
        Method("dis", "pps", 32, 512, 64, 4, 8),
        Method("dis", "pps", 64, 1024, 128, 4, 16),
    ]
    return per_row + two_strata + several_tails + updated


def measure(task: Task, method: Method, features: Tensor, logits: Tensor, teacher_logits: Tensor) -> dict:
    """Error and bias of one method on one batch, over many samples."""
    features = features.requires_grad_()
    weight, temperature = task.head.weight, task.temperature
    logits = logits.detach().requires_grad_()
    exact = exact_distillation_loss(logits, teacher_logits, temperature).mean()
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    signal = (logits.detach() / temperature).softmax(1) - (teacher_logits / temperature).softmax(1)
    reference = {"features": exact_gradient @ weight.detach(), "head": exact_gradient.T @ features.detach()}
    squared, by_item = dict.fromkeys(reference, 0.0), torch.zeros(len(features))
    mean = {name: torch.zeros_like(value) for name, value in reference.items()}
    repeats = 1 if method.proposal == "topk" else task.num_sampled
    for _ in range(repeats):
        sample = method.sample(teacher_logits, signal, temperature)
        ids = sample.item_ids, sample.tail_ids
        columns = sampled_logits(features, weight, task.head.bias, *ids, updates=sample.updates)
        loss, _ = sampled_forward_kl(columns, sample, temperature)
        gradients = torch.autograd.grad(loss.mean(), (features, weight))
        for name, value in zip(reference, gradients, strict=True):
            squared[name] += float((value - reference[name]).square().sum()) / repeats
            mean[name] += value / repeats
        by_item += (gradients[0] - reference["features"]).square().sum(1) / repeats
    size = {name: float(value.square().sum()) for name, value in reference.items()}
    bias2 = float((mean["features"] - reference["features"]).square().sum())
    if repeats > 1:  # what averaging over finitely many samples leaves of the variance is no bias
        bias2 -= (squared["features"] - bias2) / (repeats - 1)
    return {
        "proposal": method.proposal,
        "sampler": method.sampler,
        "sampled": method.sampled,
        "shared": method.shared,
        "tails": method.tails,
        "updated": method.updated,
        "depth": method.depth or logits.shape[1],
        "rows_touched": method.rows_touched(len(features)),
        "error": squared["features"] / size["features"],
        "error_head": squared["head"] / size["head"],
        "bias2": bias2 / size["features"],
        # What more classes for rows with larger errors could save of it, at the same number of classes in all.
        "between_rows": 1 - float(by_item.sqrt().mean().square() / by_item.mean()),
    }


def run(task: Task) -> list[dict]:
    """Trains the student and measures every method at the steps."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for method in task.methods:
        method.build(task.head.out_features)
    captured = {}
    task.head.register_forward_pre_hook(lambda module, args: captured.update(features=args[0].detach()))
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=task.learning_rate, weight_decay=0.05)
    measured = next(task.batches(task.measured_size, generator))
    stream = task.batches(task.batch_size, generator)
    records = []
    for step in range(-WARM_UP_BATCHES, max(task.steps) + 1):
        if step in task.steps:
            task.student.eval()
            with torch.no_grad():
                logits, teacher_logits = rows(task.student(**measured).logits), rows(task.teacher(**measured).logits)
            for method in task.methods:
                record = measure(task, method, rows(captured["features"]), logits, teacher_logits)
                records.append({"step": step, **record})
            profile = rank_profile(logits / task.temperature, teacher_logits / task.temperature)
            spread = spread_by_frequency(teacher_logits / task.temperature)
            print(f"{table(records, step)}\n\n{profile}\n{spread}", flush=True)
        task.student.train()
        inputs = next(stream)
        with torch.no_grad():
            teacher_logits = rows(task.teacher(**inputs).logits)
        logits = rows(task.student(**inputs).logits)
        for method in task.methods:
            method.learn(teacher_logits, logits.detach(), task.temperature)
        if step >= 0:
            optimizer.zero_grad()
            exact_distillation_loss(logits, teacher_logits, task.temperature).mean().backward()
            optimizer.step()
    return records


def rows(values: Tensor) -> Tensor:
    """One row an image or token: ``[N, C]``."""
    return values.flatten(0, -2)


def rank_profile(logits: Tensor, teacher_logits: Tensor) -> str:
    """Where the disagreement Σ|s - p| lies, by the teacher's ranks."""
    student, teacher = logits.softmax(1), teacher_logits.softmax(1)
    order = teacher.argsort(1, descending=True)
    by_rank = (student - teacher).abs().gather(1, order).mean(0)
    by_rank = by_rank / by_rank.sum()
    bands = (("1", 0, 1), ("2-10", 1, 10), ("11-64", 10, 64), ("65-512", 64, 512), ("beyond", 512, None))
    shares = ", ".join(f"{name}: {by_rank[start:stop].sum():.2f}" for name, start, stop in bands)
    return f"teacher's mean top probability {teacher.amax(1).mean():.2f}; disagreement by rank: {shares}"


def spread_by_frequency(teacher_logits: Tensor) -> str:
    """How much a class's log-probability varies over the rows, for classes from the commonest to the rarest."""
    log_probs = teacher_logits.log_softmax(1)
    spread = log_probs.std(0)[log_probs.exp().mean(0).argsort(descending=True)]
    bands = {f"{start + 1:,}-{10 * start or 10:,}": spread[start : 10 * start or 10] for start in (0, 10, 100, 1000)}
    bands[f"rarer than {10_000:,}"] = spread[10_000:]
    shares = ", ".join(f"{name}: {band.mean():.1f}" for name, band in bands.items() if len(band))
    return f"standard deviation of the teacher's log-probability over rows, by how common a class is: {shares}"


def table(records: list[dict], step: int) -> str:
    """The records of one step, as Markdown."""
    lines = [
        f"\nstep {step}\n",
        "| proposal | sampler | K | K_t | tails | m | U | rows of W | error | error on W | bias² |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['proposal']} | {r['sampler']} | {r['sampled']} | {r['shared']} | {r['tails']} | {r['depth']} "
        f"| {r['updated'] or ''} | {r['rows_touched']:,} "
        f"| {r['error']:.4f} | {r['error_head']:.4f} | {r['bias2']:.4f} |"
        for r in records
        if r["step"] == step
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["glyphs", "lm"], default="glyphs")
    parser.add_argument("--teacher", type=Path, help="saved by run_glyphs.py or run_clm.py; of glyphs: else trained")
    parser.add_argument("--teacher_epochs", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    task = {"glyphs": glyphs, "lm": lm}[arguments.task](arguments)
    task.teacher.eval()
    records = run(task)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
