"""How far the sampled gradient is from the exact one: every proposal and sampler, on the glyph task.

    python benchmarks/estimator_error.py --teacher runs/glyphs/teacher --json estimator_error.json

A student is distilled exactly (temperature 2, no labels, batches of 256). At steps 0, 100 and 480 each method draws
classes many times for the same 128 rows; error is E‖ĝ - g‖² / ‖g‖² of the gradient on the features, error_head the
same on the head's weights, bias2 the part of error that no number of draws averages away. What a method learns, it
learns from its own draws at every training step; before step 0 it sees 20 batches of the untrained student.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import ResNetForImageClassification

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from glyph_task import augment, build_student, build_teacher, load_task, train_teacher

from hf_dis import ClassSampler, make_sampler
from hf_dis.losses import exact_distillation_loss, sampled_distillation_loss
from hf_dis.proposal import Proposal
from hf_dis.sampling import ClassDraw
from hf_dis.targets import TeacherTargets

TEMPERATURE = 2.0
STEPS = (0, 100, 480)
WARM_UP_BATCHES = 20
BATCH_ROWS, MEASURED_ROWS, NUM_DRAWS = 256, 128, 40


class OracleProposal(Proposal):
    """q ∝ |s - p|, which needs every student logit: what no proposal over ranks or classes can beat by much."""

    disagreement: Tensor

    def rank_density(self, targets: TeacherTargets) -> Tensor:
        density = self.disagreement.gather(1, targets.ids).double()
        return 0.95 * density / density.sum(1, keepdim=True) + 0.05 / self.num_ranks


@dataclass
class Method:
    """A proposal, a sampler and a layout; ``depth`` None resolves every rank."""

    proposal: str
    sampler: str
    sampled: int
    shared: int = 0
    depth: int | None = None
    drawer: ClassSampler = field(init=False)

    def build(self, num_classes: int) -> None:
        depth = self.depth or num_classes
        if self.proposal == "oracle":
            proposal = OracleProposal(num_classes, num_classes, depth)
            self.drawer = ClassSampler(proposal, num_classes, self.sampled, 0, depth, self.sampler)
        else:
            self.drawer = make_sampler(
                num_classes,
                num_sampled_classes=self.sampled,
                num_shared_classes=self.shared,
                rank_depth=depth,
                proposal=self.proposal,
                sampler="pps" if self.sampler == "none" else self.sampler,
            )

    def draw(self, teacher_logits: Tensor, disagreement: Tensor) -> ClassDraw:
        if self.proposal == "oracle":
            self.drawer.proposal.disagreement = disagreement.abs()
        return self.drawer.draw([TeacherTargets(teacher_logits, TEMPERATURE, self.drawer.rank_depth)])

    def learn(self, teacher_logits: Tensor, logits: Tensor) -> None:
        if self.proposal == "dis" or (self.proposal == "teacher" and self.shared):
            draw = self.draw(teacher_logits, logits)
            _, disagreement = sampled_distillation_loss(drawn(logits, draw), draw, TEMPERATURE)
            self.drawer.learn(draw, disagreement)


def methods() -> list[Method]:
    """Every row of the table."""
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
    return per_row + two_strata


def drawn(logits: Tensor, draw: ClassDraw) -> Tensor:
    """The drawn columns of full logits."""
    return torch.cat([logits.gather(1, draw.row_ids), logits[:, draw.shared_ids]], 1)


def measure(method: Method, features: Tensor, weight: Tensor, logits: Tensor, teacher_logits: Tensor) -> dict:
    """Error and bias of one method on one batch, over many draws."""
    logits = logits.detach().requires_grad_()
    exact = exact_distillation_loss(logits, teacher_logits, TEMPERATURE).mean()
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    disagreement = (logits.detach() / TEMPERATURE).softmax(1) - (teacher_logits / TEMPERATURE).softmax(1)
    reference = {"features": exact_gradient @ weight, "head": exact_gradient.T @ features}
    squared = dict.fromkeys(reference, 0.0)
    mean = {name: torch.zeros_like(value) for name, value in reference.items()}
    repeats = 1 if method.proposal == "topk" else NUM_DRAWS
    for _ in range(repeats):
        draw = method.draw(teacher_logits, disagreement)
        loss, _ = sampled_distillation_loss(drawn(logits, draw), draw, TEMPERATURE)
        (gradient,) = torch.autograd.grad(loss.mean(), logits)
        for name, value in {"features": gradient @ weight, "head": gradient.T @ features}.items():
            squared[name] += float((value - reference[name]).square().sum()) / repeats
            mean[name] += value / repeats
    size = {name: float(value.square().sum()) for name, value in reference.items()}
    bias2 = float((mean["features"] - reference["features"]).square().sum())
    if repeats > 1:  # what averaging over finitely many draws leaves of the variance is no bias
        bias2 -= (squared["features"] - bias2) / (repeats - 1)
    return {
        "proposal": method.proposal,
        "sampler": method.sampler,
        "sampled": method.sampled,
        "shared": method.shared,
        "depth": method.depth or logits.shape[1],
        "rows_touched": len(features) * method.sampled + method.shared,
        "error": squared["features"] / size["features"],
        "error_head": squared["head"] / size["head"],
        "bias2": bias2 / size["features"],
    }


def batches(dataset, num_rows: int, generator: torch.Generator):
    """Augmented training images, for ever."""
    while True:
        index = torch.randint(len(dataset), (num_rows,), generator=generator)
        yield augment(dataset.images[index])


def run(teacher, student, train_dataset) -> list[dict]:
    """Trains the student and measures every method at the steps."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    all_methods = methods()
    for method in all_methods:
        method.build(student.config.num_labels)
    head = student.classifier[-1]
    captured = {}
    head.register_forward_pre_hook(lambda module, args: captured.update(features=args[0].detach()))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.05)
    measured_images = next(batches(train_dataset, MEASURED_ROWS, generator))
    stream = batches(train_dataset, BATCH_ROWS, generator)
    records = []
    for step in range(-WARM_UP_BATCHES, max(STEPS) + 1):
        if step in STEPS:
            student.eval()
            with torch.no_grad():
                logits = student(pixel_values=measured_images).logits
                teacher_logits = teacher(pixel_values=measured_images).logits
            for method in all_methods:
                measured = measure(method, captured["features"], head.weight.detach(), logits, teacher_logits)
                records.append({"step": step, **measured})
            print(f"{table(records, step)}\n\n{rank_profile(logits, teacher_logits)}", flush=True)
        student.train()
        images = next(stream)
        with torch.no_grad():
            teacher_logits = teacher(pixel_values=images).logits
        logits = student(pixel_values=images).logits
        for method in all_methods:
            method.learn(teacher_logits, logits.detach())
        if step >= 0:
            optimizer.zero_grad()
            exact_distillation_loss(logits, teacher_logits, TEMPERATURE).mean().backward()
            optimizer.step()
    return records


def rank_profile(logits: Tensor, teacher_logits: Tensor) -> str:
    """Where the disagreement Σ|s - p| lies, by the teacher's ranks."""
    student, teacher = (logits / TEMPERATURE).softmax(1), (teacher_logits / TEMPERATURE).softmax(1)
    order = teacher.argsort(1, descending=True)
    by_rank = (student - teacher).abs().gather(1, order).mean(0)
    by_rank = by_rank / by_rank.sum()
    bands = (("1", 0, 1), ("2-10", 1, 10), ("11-64", 10, 64), ("65-512", 64, 512), ("beyond", 512, None))
    shares = ", ".join(f"{name}: {by_rank[start:stop].sum():.2f}" for name, start, stop in bands)
    return f"teacher's mean top probability {teacher.amax(1).mean():.2f}; disagreement by rank: {shares}"


def table(records: list[dict], step: int) -> str:
    """The records of one step, as Markdown."""
    lines = [
        f"\nstep {step}\n",
        "| proposal | sampler | K | K_t | m | rows of W | error | error on W | bias² |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['proposal']} | {r['sampler']} | {r['sampled']} | {r['shared']} | {r['depth']} | {r['rows_touched']:,} "
        f"| {r['error']:.4f} | {r['error_head']:.4f} | {r['bias2']:.4f} |"
        for r in records
        if r["step"] == step
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a teacher saved by examples/run_glyphs.py; trained if not given")
    parser.add_argument("--teacher_epochs", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    train_dataset, _, names = load_task()
    if arguments.teacher:
        teacher = ResNetForImageClassification.from_pretrained(arguments.teacher)
    else:
        teacher = build_teacher(len(names))
        train_teacher(teacher, train_dataset, arguments.teacher_epochs, "runs/estimator_error/teacher")
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    records = run(teacher.eval(), build_student(len(names)), train_dataset)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
