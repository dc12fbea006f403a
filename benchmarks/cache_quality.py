"""The loss in quality where few bytes are kept of a teacher's targets: four designs at equal bytes, on two tasks.

    python benchmarks/cache_quality.py --teacher runs/glyphs/teacher --json cache_quality.json

rs_kd             ids sampled from p with replacement, each with a count ("Sparse Logit Sampling", ACL 2025)
topk              the top k with their log-probabilities, made to sum to one
topk_tail_bucket  the same, and one more class for all the rest, for teacher and student
hf_dis            the top m with their log-probabilities, and T systematic samples from the rest

Glyphs: 3,375 characters, images without augmentation, temperature 2. Text: the task of examples/run_clm.py, 32,000
tokens, temperature 1. The student computes every logit, so that only the targets differ.

A student is distilled exactly. At some of its steps the gradient of all its parameters, for one batch, is compared
with the exact one. angle is in degrees, and error is ‖ĝ - g‖² / ‖g‖²; both are means over samples and steps. bias² is
the part of error that no number of samples averages away. Then a student is trained from a cache of each design.

An item of rs_kd is counted as an id and a count of 7 bits for each distinct class, or as an id for each sample,
whichever is less. 8 bytes per item are common to all designs. The 12 bytes per example for its key and its place in
the file are not counted.

With --device teacher and students are on the device.
"""

from __future__ import annotations

import math
import tempfile
from typing import NamedTuple

import cache_tasks
import torch
from cache_tasks import LAYOUTS, Task
from common import header, machine, parse, parser, row, write
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from hf_dis import DISDistillationTrainer, cache_teacher_targets
from hf_dis.loss.exact import exact_loss
from hf_dis.models.tasks import find_task, split_labels
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import CompactTargets, TargetLayout, compact_targets

COUNT_BITS, NUM_SAMPLES = 7, 8


class Design(NamedTuple):
    """The stored part of a teacher's targets.

    Attributes:
        layout: in bytes.
        sampling: of the stored sample, ``"systematic"`` or ``"independent"``.
        item_bytes: mean bytes per item.
        has_bucket: one more class stands for all that are not stored.
    """

    layout: TargetLayout
    sampling: str
    item_bytes: float
    has_bucket: bool = False

    def targets(self, logits: Tensor, temperature: float, seed: int) -> CompactTargets:
        """The stored answer for the teacher's logits ``[N, C]``, in full precision."""
        generator = torch.Generator().manual_seed(seed)
        layout = self.layout
        return compact_targets(logits, temperature, layout.depth, layout.sample_size, generator, self.sampling)

    def loss(self, logits: Tensor, targets: CompactTargets, temperature: float) -> Tensor:
        """The student's loss ``[N]`` on the stored answer."""
        if self.has_bucket:
            return bucket_loss(logits, targets, temperature)
        num_classes = self.layout.num_classes
        return exact_loss(logits, num_classes, [CachedTargets(targets, num_classes)], None, temperature, 0.0)[0]


def bucket_loss(logits: Tensor, targets: CompactTargets, temperature: float) -> Tensor:
    """τ² KL over the top k and one class for the rest, ``[N]``."""
    scaled = logits.float() / temperature
    log_probs = scaled.log_softmax(1)
    student_tail = scaled.scatter(1, targets.ids, -torch.inf).logsumexp(1) - scaled.logsumexp(1)
    top = targets.log_probs.exp() * (targets.log_probs - log_probs.gather(1, targets.ids))
    tail = targets.log_tail_mass.exp() * (targets.log_tail_mass.clamp_min(-1e4) - student_tail)
    return temperature**2 * (top.sum(1) + tail)


class BucketTrainer(DISDistillationTrainer):
    """Trains on a cache with one more class for all that are not stored."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = self.distiller.begin(inputs)
        outputs = model(**step.inputs)
        (targets,) = self.distiller.teacher.all_classes(step.inputs, step.items)
        return bucket_loss(outputs.logits, targets.compact, self.args.temperature).sum() / num_items_in_batch


def designs(task: Task, logits: Tensor) -> dict[str, Design]:
    """The designs at nearly equal bytes, for the teacher's logits ``[N, C]``."""
    ours = TargetLayout(logits.shape[1], *LAYOUTS[task.name])
    top = TargetLayout(ours.num_classes, (ours.item_bytes - 8) * 8 // (ours.id_bits + 16), 0)
    return {
        "rs_kd": rs_kd(logits, task.temperature, ours),
        "topk": Design(top, "systematic", top.item_bytes),
        "topk_tail_bucket": Design(top, "systematic", top.item_bytes, has_bucket=True),
        "hf_dis": Design(ours, "systematic", ours.item_bytes),
    }


def rs_kd(logits: Tensor, temperature: float, ours: TargetLayout) -> Design:
    """As many independent samples as fit into the bytes of a given layout, in the mean over items."""
    design, samples = None, ours.sample_size
    while True:
        candidate = Design(TargetLayout(ours.num_classes, 0, samples), "independent", 0.0)
        stored = CachedTargets(candidate.targets(logits, temperature, seed=0), ours.num_classes)
        distinct = float(stored.used.sum(1).float().mean())
        needed = 8 + min(samples * ours.id_bits, distinct * (ours.id_bits + COUNT_BITS)) / 8
        if needed > ours.item_bytes:
            return design
        design, samples = candidate._replace(item_bytes=needed), samples + max(1, samples // 50)


def students(task: Task, folder: str) -> list[PreTrainedModel]:
    """A student at each snapshot of exact distillation."""
    found = []
    for steps in task.snapshots:
        set_seed(0)
        student = task.student().to(task.teacher.device)
        if steps:
            args = task.arguments(folder, max_steps=steps, lr_scheduler_type="constant_with_warmup")
            DISDistillationTrainer(
                student, task.teacher, args, train_dataset=task.train_dataset, data_collator=task.collator
            ).train()
        found.append(student.eval())
    return found


def gradient(student: nn.Module, loss: Tensor) -> Tensor:
    """The gradient of all parameters, flat, float64."""
    parts = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None]).double()


def gradient_errors(
    student: nn.Module, logits: Tensor, teacher_logits: Tensor, exact: Tensor, design: Design, temperature: float
) -> tuple[float, float, float]:
    """Angle in degrees, squared error and bias of the gradient on stored targets, means over samples.

    Args:
        student: the model.
        logits, teacher_logits: of one batch, ``[N, C]``.
        exact: the exact gradient, flat.
        design: of the stored targets.
        temperature: τ.
    """
    repeats = NUM_SAMPLES if design.layout.sample_size else 1
    size, mean, angle, squared = exact.square().sum(), torch.zeros_like(exact), 0.0, 0.0
    for seed in range(repeats):
        targets = design.layout.unpack(design.layout.pack(design.targets(teacher_logits, temperature, seed)))
        estimate = gradient(student, design.loss(logits, targets, temperature).mean())
        cosine = torch.nn.functional.cosine_similarity(estimate, exact, dim=0)
        angle += math.degrees(math.acos(min(1.0, float(cosine)))) / repeats
        squared += float((estimate - exact).square().sum() / size) / repeats
        mean += estimate / repeats
    bias2 = float((mean - exact).square().sum() / size)
    if repeats > 1:  # the mean over finitely many samples still has some variance, which is subtracted
        bias2 -= (squared - bias2) / (repeats - 1)
    return angle, squared, bias2


def compare(task: Task, folder: str) -> dict[str, tuple[Design, dict[str, float]]]:
    """Every design with its record: bytes, angle, error and bias."""
    loader = torch.utils.data.DataLoader(
        task.train_dataset,
        batch_size=task.settings["per_device_train_batch_size"],
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=task.collator,
    )
    device = task.teacher.device
    batch = {name: values.to(device) for name, values in next(iter(loader)).items()}
    items, inputs = split_labels(task.teacher, find_task(task.teacher), batch)
    with torch.no_grad():
        teacher_logits = items.of(task.teacher.eval()(**inputs).logits)
    compared = designs(task, teacher_logits)
    errors = {name: torch.zeros(3, dtype=torch.float64) for name in compared}
    for student in students(task, folder):
        logits = items.of(student(**inputs).logits)
        loss, _ = exact_loss(logits, logits.shape[1], [teacher_logits], None, task.temperature, 0.0)
        exact = gradient(student, loss.mean())
        for name, design in compared.items():
            found = gradient_errors(student, logits, teacher_logits, exact, design, task.temperature)
            errors[name] += torch.tensor(found, dtype=torch.float64) / len(task.snapshots)
    names = ("angle_deg", "error", "bias2")
    return {
        name: (
            design,
            {"bytes_per_item": design.item_bytes, **dict(zip(names, errors[name].tolist(), strict=True))},
        )
        for name, design in compared.items()
    }


def train(task: Task, design: Design, folder: str, seed: int) -> float:
    """Top-1, or perplexity of text, of the student that is trained from a cache of this design."""
    layout = design.layout
    cache = cache_teacher_targets(
        task.teacher,
        task.train_dataset,
        f"{folder}/{layout.depth}-{layout.sample_size}-{design.sampling}",
        temperature=task.temperature,
        depth=layout.depth,
        sample_size=layout.sample_size,
        design=design.sampling,
        data_collator=task.collator,
        batch_size=task.settings["per_device_train_batch_size"],
        show_progress=False,
    )
    set_seed(0)
    trainer = (BucketTrainer if design.has_bucket else DISDistillationTrainer)(
        task.student(),
        task.teacher,
        task.arguments(folder, seed=seed),
        teacher_cache=cache,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.collator,
        **task.metrics,
    )
    set_seed(seed)
    trainer.train()
    metrics = trainer.evaluate()
    return math.exp(metrics["eval_ce_loss"]) if task.name == "text" else metrics["eval_top1"]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tasks", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    made.add_argument("--teacher", help="of the glyphs, saved by examples/run_glyphs.py; trained first if not given")
    made.add_argument("--text_teacher", help="of the text, with its tokenizer; trained first if not given")
    made.add_argument("--epochs", type=float, default=4.0, help="of a glyph student; 0: gradients only")
    made.add_argument("--steps", type=int, default=160, help="of a text student; 0: gradients only")
    made.add_argument("--seeds", type=int, default=1, help="students of each design")
    arguments = parse(made)
    logging.set_verbosity_error()
    records = []
    print(machine(arguments.device))
    print(header("task", "design", "m", "T", "bytes per item", "angle", "error", "bias²", "top-1 or perplexity"))
    for name in arguments.tasks:
        is_text = name == "text"
        length = arguments.steps if is_text else arguments.epochs
        task = (
            cache_tasks.text(arguments.text_teacher, length, arguments.device)
            if is_text
            else cache_tasks.glyphs(arguments.teacher, length, arguments.device)
        )
        with tempfile.TemporaryDirectory() as folder:
            for kind, (design, record) in compare(task, folder).items():
                reached = [train(task, design, folder, seed) for seed in range(arguments.seeds if length else 0)]
                quality = sum(reached) / len(reached) if reached else None
                sizes = {"depth": design.layout.depth, "sample_size": design.layout.sample_size}
                records.append({"task": name, "design": kind, **sizes, **record, "top1_or_ppl": quality})
                print_record(records[-1])
    write(records, arguments.json, arguments.device)


def print_record(record: dict) -> None:
    """Prints one line of the table."""
    quality = record["top1_or_ppl"]
    if quality is not None:
        quality = f"{quality:.1f}" if record["task"] == "text" else f"{quality:.1%}"
    errors = f"{record['angle_deg']:.1f}°", f"{record['error']:.3f}", f"{record['bias2']:.4f}"
    setting = [record[key] for key in ("task", "design", "depth", "sample_size")]
    print(row(*setting, f"{record['bytes_per_item']:.0f}", *errors, quality), flush=True)


if __name__ == "__main__":
    main()
