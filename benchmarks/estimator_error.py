"""The error of the sampled gradient: every proposal and design, on the glyph task and on text.

    python benchmarks/estimator_error.py --teacher runs/glyphs/teacher --json estimator_error.json
    python benchmarks/estimator_error.py --task lm --teacher runs/clm/_teacher --json estimator_error_lm.json
    python benchmarks/estimator_error.py --task lm --teacher runs/clm/_teacher --divergence jsd --default_layout

A student is distilled exactly, without labels: glyphs at temperature 2 in batches of 256, or the tokens of
run_clm.py's texts at temperature 1 in batches of 512. At some steps each method samples classes many times for the
same 128 images (512 tokens). error is E‖ĝ - g‖² / ‖g‖² of the gradient on the features, and error_head the same on the
head's weights. bias2 is the part of error that no number of samples averages away. A method learns from its own
samples at every training step; before step 0 it learns from 20 batches of the untrained student.

With --divergence another loss is distilled and estimated. With --default_layout every proposal is measured in the
default layout alone, beside truncations to as many classes.

With --own_text (of --task lm) the student learns from the texts by the forward KL for 200 steps. From step 0 on it
learns from text of its own. The student continues the first 32 tokens of a block by 96 sampled tokens, which are the
items. The token that the student sampled is always in an item's sample, as in the on-policy trainers.

With --device models and batches are on the device, in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import header, machine, parse, parser, row, write
from sampling_methods import GLYPH_DEFAULT, LM_DEFAULT, Method, default_methods, glyph_methods, lm_methods
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import clm_task
import glyph_task

from hf_dis.arguments import DIVERGENCES
from hf_dis.loss.divergence import FORWARD_KL, Divergence
from hf_dis.loss.f_divergence import make_divergence

WARM_UP_BATCHES = 20
# Of --own_text: steps on given texts, and the tokens of a block that the student does not write.
GIVEN_TEXT_STEPS, PROMPT_TOKENS = 200, 32


@dataclass
class Task:
    """Teacher, student and batches; the methods to measure, and the steps at which they are measured."""

    teacher: nn.Module
    student: nn.Module
    head: nn.Linear
    batches: Callable[[int, torch.Generator], Iterator[dict[str, Tensor]]]
    batch_size: int
    measured_size: int
    temperature: float
    learning_rate: float
    steps: tuple[int, ...]
    num_samples: int
    methods: list[Method]
    default_layout: tuple[int, ...]
    divergence: Divergence = FORWARD_KL
    writes: bool = False

    @torch.no_grad()
    def written(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of a step: the given ones, or what the student writes after their first tokens."""
        if not self.writes:
            return inputs
        was_training, prompts = self.student.training, inputs["input_ids"][:, :PROMPT_TOKENS]
        self.student.eval()
        new = inputs["input_ids"].shape[1] - PROMPT_TOKENS
        mask, options = torch.ones_like(prompts), {"do_sample": True, "top_k": 0, "pad_token_id": 0}
        # No text ends early, so that every token after the prompt is the student's.
        ids = self.student.generate(prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)
        self.student.train(was_training)
        return {"input_ids": ids}

    def by_item(self, values: Tensor) -> Tensor:
        """The values of each item: ``[N, C]`` of ``[B, C]`` or ``[B, S, C]``."""
        return (values[:, PROMPT_TOKENS - 1 : -1] if self.writes else values).flatten(0, -2)

    def labels(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """The class that is always in an item's sample, ``[N]``: the token that the student wrote."""
        return inputs["input_ids"][:, PROMPT_TOKENS:].flatten() if self.writes else None


def glyphs(arguments: argparse.Namespace) -> Task:
    """Characters as images, at temperature 2."""
    train_dataset, _, names = glyph_task.load_task()
    if arguments.teacher:
        teacher = glyph_task.load_teacher(arguments.teacher)
    else:
        teacher = glyph_task.build_teacher(len(names))
        glyph_task.train_teacher(teacher, train_dataset, arguments.teacher_epochs, "runs/estimator_error/teacher")
    student = glyph_task.build_student(len(names)).to(arguments.device)

    def batches(num_images: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        while True:
            index = torch.randint(len(train_dataset), (num_images,), generator=generator)
            yield {"pixel_values": glyph_task.augment(train_dataset.images[index]).to(arguments.device)}

    return Task(
        teacher=teacher.to(arguments.device),
        student=student,
        head=student.classifier[-1],
        batches=batches,
        batch_size=256,
        measured_size=128,
        temperature=2.0,
        learning_rate=3e-3,
        steps=(0, 100, 480),
        num_samples=40,
        methods=glyph_methods(),
        default_layout=GLYPH_DEFAULT,
    )


def lm(arguments: argparse.Namespace) -> Task:
    """The text of Python's standard library, at temperature 1."""
    if arguments.teacher is None:
        raise SystemExit("--task lm needs --teacher: examples/run_clm.py keeps the one it trains in _teacher")
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    tokens = clm_task.tokenized(clm_task.load_texts(), tokenizer, 128)["train"].with_format("torch")["input_ids"][:]
    student = clm_task.build_student(len(tokenizer)).to(arguments.device)

    def batches(num_blocks: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        while True:
            index = torch.randint(len(tokens), (num_blocks,), generator=generator)
            yield {"input_ids": tokens[index].to(arguments.device)}

    return Task(
        teacher=AutoModelForCausalLM.from_pretrained(arguments.teacher).to(arguments.device),
        student=student,
        head=student.lm_head,
        batches=batches,
        batch_size=4,
        measured_size=4,
        temperature=1.0,
        learning_rate=2e-3,
        steps=(0, 40, 80, 160),
        num_samples=10,
        methods=lm_methods(),
        default_layout=LM_DEFAULT,
    )


def measure(
    task: Task, method: Method, features: Tensor, logits: Tensor, teacher_logits: Tensor, labels: Tensor | None
) -> dict:
    """Error and bias of one method on one batch, over many samples."""
    features = features.requires_grad_()
    weight, temperature = task.head.weight, task.temperature
    signal = task.divergence.exact(logits, teacher_logits, temperature)[1] / temperature
    exact_gradient = temperature / len(logits) * signal
    reference = {"features": exact_gradient @ weight.detach(), "head": exact_gradient.T @ features.detach()}
    squared, by_item = dict.fromkeys(reference, 0.0), features.new_zeros(len(features))
    mean = {name: torch.zeros_like(value) for name, value in reference.items()}
    repeats = 1 if method.design == "none" else task.num_samples
    for _ in range(repeats):
        gradients = method.gradients(task.head, features, teacher_logits, signal, temperature, labels)
        for name, value in zip(reference, gradients, strict=True):
            squared[name] += float((value - reference[name]).square().sum()) / repeats
            mean[name] += value / repeats
        by_item += (gradients[0] - reference["features"]).square().sum(1) / repeats
    size = {name: float(value.square().sum()) for name, value in reference.items()}
    bias2 = float((mean["features"] - reference["features"]).square().sum())
    if repeats > 1:  # the mean over finitely many samples still has some variance, which is subtracted
        bias2 -= (squared["features"] - bias2) / (repeats - 1)
    layout = method.sampled, method.shared, method.depth, method.tails
    return {
        "divergence": task.divergence.name,
        "own_text": task.writes,
        "default": (method.name, method.updated, layout) == ("dis", None, task.default_layout),
        "proposal": method.name,
        "design": method.design,
        "sampled": method.sampled,
        "shared": method.shared,
        "tails": method.tails,
        "updated": method.updated,
        "depth": method.depth or logits.shape[1],
        "rows_touched": method.rows_touched(len(features)),
        "error": squared["features"] / size["features"],
        "error_head": squared["head"] / size["head"],
        "bias2": bias2 / size["features"],
        # The share that more classes for items with larger errors could save, at the same number of classes in all.
        "between_items": 1 - float(by_item.sqrt().mean().square() / by_item.mean()),
    }


def run(task: Task) -> list[dict]:
    """Trains the student and measures every method at the steps."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for method in task.methods:
        method.divergence = task.divergence
        method.build(task.head.out_features, task.head.weight.device)
    captured = {}
    task.head.register_forward_pre_hook(lambda module, args: captured.update(features=args[0].detach()))
    optimizer = torch.optim.AdamW(task.student.parameters(), lr=task.learning_rate, weight_decay=0.05)
    given = next(task.batches(task.measured_size, generator))
    stream = task.batches(task.batch_size, generator)
    if task.writes:
        learn_given_text(task, stream, optimizer)
    records = []
    for step in range(-WARM_UP_BATCHES, max(task.steps) + 1):
        if step in task.steps:
            task.student.eval()
            inputs = task.written(given)
            with torch.no_grad():
                models = task.student, task.teacher
                logits, teacher_logits = (task.by_item(model(**inputs).logits) for model in models)
            features = task.by_item(captured["features"])
            for method in task.methods:
                record = measure(task, method, features, logits, teacher_logits, task.labels(inputs))
                records.append({"step": step, **record})
            profile = rank_profile(logits / task.temperature, teacher_logits / task.temperature)
            spread = spread_by_frequency(teacher_logits / task.temperature)
            print(f"{table(records, step)}\n\n{profile}\n{spread}", flush=True)
        inputs = task.written(next(stream))
        slope, teacher_logits, logits = exact_step(task, inputs, task.divergence)
        for method in task.methods:
            method.learn(teacher_logits, logits.detach(), task.temperature, task.labels(inputs))
        if step >= 0:
            optimizer.zero_grad()
            logits.backward(slope)
            optimizer.step()
    return records


def exact_step(task: Task, inputs: dict[str, Tensor], divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the mean loss on the student's logits, the teacher's logits and the student's, ``[N, C]``."""
    task.student.train()
    with torch.no_grad():
        teacher_logits = task.by_item(task.teacher(**inputs).logits)
    logits = task.by_item(task.student(**inputs).logits)
    _, slope = divergence.exact(logits.detach(), teacher_logits, task.temperature)
    return slope / len(logits), teacher_logits, logits


def learn_given_text(task: Task, stream: Iterator[dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Distils the student by the forward KL on the given texts, so that it writes text at all."""
    whole = replace(task, writes=False)
    for _ in range(GIVEN_TEXT_STEPS):
        slope, _, logits = exact_step(whole, next(stream), FORWARD_KL)
        optimizer.zero_grad()
        logits.backward(slope)
        optimizer.step()


def rank_profile(logits: Tensor, teacher_logits: Tensor) -> str:
    """The shares of Σ|s - p| by the teacher's ranks, in words."""
    student, teacher = logits.softmax(1), teacher_logits.softmax(1)
    order = teacher.argsort(1, descending=True)
    by_rank = (student - teacher).abs().gather(1, order).mean(0)
    by_rank = by_rank / by_rank.sum()
    bands = (("1", 0, 1), ("2-10", 1, 10), ("11-64", 10, 64), ("65-512", 64, 512), ("beyond", 512, None))
    shares = ", ".join(f"{name}: {by_rank[start:stop].sum():.2f}" for name, start, stop in bands)
    return f"teacher's mean top probability {teacher.amax(1).mean():.2f}; |s - p| by rank: {shares}"


def spread_by_frequency(teacher_logits: Tensor) -> str:
    """The variation of a class's log-probability over items, from the commonest classes to the rarest, in words."""
    log_probs = teacher_logits.log_softmax(1)
    spread = log_probs.std(0)[log_probs.exp().mean(0).argsort(descending=True)]
    bands = {f"{start + 1:,}-{10 * start or 10:,}": spread[start : 10 * start or 10] for start in (0, 10, 100, 1000)}
    bands[f"rarer than {10_000:,}"] = spread[10_000:]
    shares = ", ".join(f"{name}: {band.mean():.1f}" for name, band in bands.items() if len(band))
    return f"standard deviation of the teacher's log-probability over items, by the frequency of a class: {shares}"


def table(records: list[dict], step: int) -> str:
    """The records of one step, as Markdown."""
    names = ("proposal", "design", "K", "K_t", "tails", "m", "U", "rows of W", "error", "error on W", "bias²")
    lines = [f"\nstep {step}\n", header(*names)]
    for record in records:
        if record["step"] == step:
            layout = [record[key] for key in ("proposal", "design", "sampled", "shared", "tails", "depth", "updated")]
            errors = [f"{record[key]:.4f}" for key in ("error", "error_head", "bias2")]
            lines.append(row(*layout, f"{record['rows_touched']:,}", *errors))
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--task", choices=["glyphs", "lm"], default="glyphs")
    made.add_argument("--teacher", type=Path, help="saved by run_glyphs.py or run_clm.py; glyphs: trained if missing")
    made.add_argument("--teacher_epochs", type=float, default=8.0)
    made.add_argument("--divergence", choices=DIVERGENCES, default="forward_kl")
    made.add_argument("--jsd_beta", type=float, help="of --divergence jsd")
    made.add_argument("--own_text", action="store_true", help="text that the student writes; of --task lm")
    made.add_argument("--default_layout", action="store_true", help="the default layout alone, beside truncations")
    made.add_argument("--steps", type=int, nargs="+", help="steps at which the methods are measured")
    arguments = parse(made)
    print(machine(arguments.device))
    if arguments.own_text and arguments.task != "lm":
        made.error("--own_text needs --task lm: an image is not written by the student")
    task = {"glyphs": glyphs, "lm": lm}[arguments.task](arguments)
    task.writes = arguments.own_text
    task.divergence = make_divergence(arguments.divergence, arguments.jsd_beta)
    if arguments.default_layout:
        task.methods = default_methods(task.default_layout)
    task.steps = tuple(arguments.steps or task.steps)
    task.teacher.eval()
    write(run(task), arguments.json, arguments.device)


if __name__ == "__main__":
    main()
