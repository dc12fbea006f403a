"""What a teacher's answers lose when few bytes are kept of them: four designs at equal bytes, on two tasks.

    python benchmarks/cache_quality.py --teacher runs/glyphs/teacher --json cache_quality.json

rs_kd             ids sampled from p with replacement, each with a count ("Sparse Logit Sampling", ACL 2025)
topk              the top k with their log-probabilities, made to sum to one
topk_tail_bucket  the same, and one more class that stands for all others, for teacher and student
hf_dis            the top m with their log-probabilities, and T systematic samples from the others

Glyphs: 3,375 characters, images as they are, temperature 2. Text: the task of examples/run_clm.py, 32,000 tokens,
temperature 1. The student computes every logit, so that only the targets differ. A student is distilled exactly; at
some of its steps the gradient of all its parameters, for one batch, is compared with the exact one: angle in degrees,
error ‖ĝ - g‖² / ‖g‖², means over samples and steps, and bias2, the part of error that no number of samples averages away.
Then a student is trained from a cache of each design. A row of rs_kd is counted as an id and a count of 7 bits for
each distinct class, or as an id for each sample, whichever is less; 8 bytes a row are common to all (12 an example for
key and place in the file are not counted).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, default_data_collator, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from hf_dis import DISConfig, DISDistillationTrainer, cache_teacher_targets
from hf_dis.loss.divergence import exact_distillation_loss, sparse_distillation_loss
from hf_dis.models.tasks import find_task, split_labels
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import CompactTargets, TargetLayout, compact_targets

DESIGNS = ("rs_kd", "topk", "topk_tail_bucket", "hf_dis")
COUNT_BITS, DRAWS, BLOCK_TOKENS = 7, 8, 128
# Ranked classes and tail samples of hf_dis, the defaults of cache_teacher_targets, which set the bytes of every design.
LAYOUTS = {"glyphs": (32, 120), "text": (2, 23)}


@dataclass
class Task:
    """A teacher, its data, and how students are trained."""

    name: str
    teacher: PreTrainedModel
    student: Callable[[], PreTrainedModel]
    train_dataset: Any
    eval_dataset: Any
    collator: Callable
    temperature: float
    depth: int
    sample_size: int
    settings: dict[str, Any]
    snapshots: tuple[int, ...]
    metrics: dict[str, Any]


def glyph_task(teacher: str | None, epochs: float) -> Task:
    from glyph_task import NORMALISE, GlyphImages, build_student, build_teacher, train_teacher, whole_batch
    from glyph_task import load_task as load_augmented
    from transformers import ResNetForImageClassification

    from hf_dis.data import load_glyphs
    from hf_dis.metrics import TopKAccuracy

    glyphs = load_glyphs()
    num_classes = glyphs["train"].features["label"].num_classes
    if teacher:
        model = ResNetForImageClassification.from_pretrained(teacher)
    else:
        model = build_teacher(num_classes)
        train_teacher(model, load_augmented()[0], 8, "runs/cache_quality/teacher")
    settings = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 256,
        "per_device_eval_batch_size": 512,
        "learning_rate": 4e-3,
        "head_learning_rate": 8e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.2,
        "weight_decay": 0.02,
        "remove_unused_columns": False,
    }
    metrics = {
        "compute_metrics": lambda predicted: TopKAccuracy().compute(
            predictions=predicted.predictions, references=predicted.label_ids
        ),
        "preprocess_logits_for_metrics": lambda logits, labels: logits.topk(5).indices,
    }
    return Task(
        "glyphs",
        model.to(memory_format=torch.channels_last),
        lambda: build_student(num_classes),
        GlyphImages(glyphs["train"], NORMALISE),
        GlyphImages(glyphs["test"], NORMALISE),
        whole_batch,
        temperature=2.0,
        depth=LAYOUTS["glyphs"][0],
        sample_size=LAYOUTS["glyphs"][1],
        settings=settings,
        snapshots=(0, 100, 400),
        metrics=metrics,
    )


def text_task(teacher: str | None, steps: int) -> Task:
    from clm_task import build_student, load_texts, tokenized, train_teacher, train_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = load_texts()
    if teacher:
        tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    else:
        tokenizer = train_tokenizer(texts["train"], 32_000)
    blocks = tokenized(texts, tokenizer, BLOCK_TOKENS)
    if not teacher:
        args = DISConfig(output_dir="runs/cache_quality", disable_tqdm=True, report_to="none")
        model = train_teacher(blocks["train"], tokenizer, 400, args)
    settings = {
        "max_steps": max(1, steps),
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    }
    # As many blocks as the student is going to see, and no more.
    used = blocks["train"].shuffle(seed=0).select(range(8 * max(16, steps)))
    return Task(
        "text",
        model,
        lambda: build_student(len(tokenizer)),
        used,
        blocks["validation"].select(range(min(256, len(blocks["validation"])))),
        default_data_collator,
        temperature=1.0,
        depth=LAYOUTS["text"][0],
        sample_size=LAYOUTS["text"][1],
        settings=settings,
        snapshots=(0, 40),
        metrics={},
    )


def layouts(task: Task, logits: Tensor) -> dict[str, tuple[TargetLayout, str, float]]:
    """Layout, kind of tail, and mean bytes of a row of each design, as near below the budget as it gets."""
    num_classes = logits.shape[1]
    ours = TargetLayout(num_classes, task.depth, task.sample_size)
    top = (ours.item_bytes - 8) * 8 // (ours.id_bits + 16)
    samples, spent = ours.sample_size, 0.0
    while True:
        compact = compact_targets(logits, task.temperature, 0, samples, torch.Generator().manual_seed(0), "sampled")
        distinct = float(CachedTargets(compact, num_classes).used.sum(1).float().mean())
        needed = 8 + min(samples * ours.id_bits, distinct * (ours.id_bits + COUNT_BITS)) / 8
        if needed > ours.item_bytes:
            break
        samples, spent = samples + max(1, samples // 50), needed
    topk = TargetLayout(num_classes, top, 0), "systematic", TargetLayout(num_classes, top, 0).item_bytes
    return {
        "rs_kd": (TargetLayout(num_classes, 0, samples), "sampled", spent),
        "topk": topk,
        "topk_tail_bucket": topk,
        "hf_dis": (ours, "systematic", ours.item_bytes),
    }


def bucket_loss(logits: Tensor, compact: CompactTargets, temperature: float) -> Tensor:
    """τ² KL over the top k and one class for all others."""
    scaled = logits.float() / temperature
    log_probs = scaled.log_softmax(1)
    student_tail = scaled.scatter(1, compact.ids, -torch.inf).logsumexp(1) - scaled.logsumexp(1)
    top = compact.log_probs.exp() * (compact.log_probs - log_probs.gather(1, compact.ids))
    tail = compact.log_tail_mass.exp() * (compact.log_tail_mass.clamp_min(-1e4) - student_tail)
    return temperature**2 * (top.sum(1) + tail)


def stored_loss(design: str, logits: Tensor, compact: CompactTargets, temperature: float) -> Tensor:
    if design == "topk_tail_bucket":
        return bucket_loss(logits, compact, temperature)
    targets = CachedTargets(compact, logits.shape[1])
    return sparse_distillation_loss(logits, targets.ids, targets.log_probs, targets.target, temperature)


class StoredTrainer(DISDistillationTrainer):
    """Trains on stored targets with every logit of the student, and can tell a bucket from a class."""

    design = "hf_dis"

    def _stored_loss(self, logits, compact):
        return stored_loss(self.design, logits, compact, self.args.temperature)


def arguments_of(task: Task, folder: str, **changes: Any) -> DISConfig:
    return DISConfig(
        output_dir=folder,
        temperature=task.temperature,
        hard_label_weight=0.0,
        head_mode="exact",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        logging_steps=100,
        **{**task.settings, **changes},
    )


def students(task: Task, folder: str) -> list[PreTrainedModel]:
    """A student as it is at each snapshot of exact distillation."""
    found = []
    for steps in task.snapshots:
        set_seed(0)
        student = task.student()
        if steps:
            args = arguments_of(task, folder, max_steps=steps, lr_scheduler_type="constant_with_warmup")
            DISDistillationTrainer(
                student, task.teacher, args, train_dataset=task.train_dataset, data_collator=task.collator
            ).train()
        found.append(student.eval())
    return found


def gradient(student: nn.Module, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None]).double()


def compare(task: Task, folder: str) -> dict[str, dict[str, float]]:
    """Bytes, angle, error and bias of each design."""
    loader = torch.utils.data.DataLoader(
        task.train_dataset,
        batch_size=task.settings["per_device_train_batch_size"],
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=task.collator,
    )
    kind = find_task(task.teacher)
    rows, inputs = split_labels(task.teacher, kind, next(iter(loader)))
    with torch.no_grad():
        teacher_logits = rows.of(task.teacher.eval()(**inputs).logits)
    designs = layouts(task, teacher_logits)
    found = {
        design: {"bytes_per_row": spent, "angle_deg": 0.0, "error": 0.0} for design, (_, _, spent) in designs.items()
    }
    for student in students(task, folder):
        logits = rows.of(student(**inputs).logits)
        exact = gradient(student, exact_distillation_loss(logits, teacher_logits, task.temperature).mean())
        size = exact.square().sum()
        for design, (layout, tail, _) in designs.items():
            record, mean, squared = found[design], torch.zeros_like(exact), 0.0
            repeats = DRAWS if layout.sample_size else 1
            for seed in range(repeats):
                compact = compact_targets(
                    teacher_logits,
                    task.temperature,
                    layout.depth,
                    layout.sample_size,
                    torch.Generator().manual_seed(seed),
                    tail,
                )
                compact = layout.unpack(layout.pack(compact))
                estimate = gradient(student, stored_loss(design, logits, compact, task.temperature).mean())
                cosine = torch.nn.functional.cosine_similarity(estimate, exact, dim=0)
                record["angle_deg"] += math.degrees(math.acos(min(1.0, float(cosine)))) / repeats / len(task.snapshots)
                squared += float((estimate - exact).square().sum() / size) / repeats
                mean += estimate / repeats
            bias2 = float((mean - exact).square().sum() / size)
            if repeats > 1:  # what averaging over finitely many samples leaves of the variance is no bias
                bias2 -= (squared - bias2) / (repeats - 1)
            record["error"] += squared / len(task.snapshots)
            record["bias2"] = record.get("bias2", 0.0) + bias2 / len(task.snapshots)
    return {design: {**record, "layout": designs[design][:2]} for design, record in found.items()}


def train(task: Task, design: str, layout: TargetLayout, tail: str, folder: str, seed: int) -> dict[str, float]:
    """What the student trained from a cache of this design reaches."""
    cache = cache_teacher_targets(
        task.teacher,
        task.train_dataset,
        f"{folder}/{layout.depth}-{layout.sample_size}-{tail}",
        temperature=task.temperature,
        depth=layout.depth,
        sample_size=layout.sample_size,
        tail=tail,
        data_collator=task.collator,
        batch_size=task.settings["per_device_train_batch_size"],
        show_progress=False,
    )
    set_seed(0)
    trainer = StoredTrainer(
        task.student(),
        task.teacher,
        arguments_of(task, folder, seed=seed),
        teacher_cache=cache,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.collator,
        **task.metrics,
    )
    trainer.design = design
    set_seed(seed)
    trainer.train()
    return trainer.evaluate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--teacher", help="of the glyphs, saved by examples/run_glyphs.py; trained first if not given")
    parser.add_argument("--text_teacher", help="of the text, with its tokenizer; trained first if not given")
    parser.add_argument("--epochs", type=float, default=4.0, help="of a glyph student; 0: gradients only")
    parser.add_argument("--steps", type=int, default=160, help="of a text student; 0: gradients only")
    parser.add_argument("--seeds", type=int, default=1, help="students of each design")
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    records = []
    print("| task | design | m | T | bytes a row | angle | error | bias² | top-1 or perplexity |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.tasks:
        is_text = name == "text"
        task = (
            text_task(arguments.text_teacher, arguments.steps)
            if is_text
            else glyph_task(arguments.teacher, arguments.epochs)
        )
        trains = arguments.steps if is_text else arguments.epochs
        with tempfile.TemporaryDirectory() as folder:
            for design, record in compare(task, folder).items():
                layout, tail = record.pop("layout")
                reached = []
                for seed in range(arguments.seeds if trains else 0):
                    metrics = train(task, design, layout, tail, folder, seed)
                    reached.append(math.exp(metrics["eval_ce_loss"]) if is_text else metrics["eval_top1"])
                record = {
                    "task": name,
                    "design": design,
                    "depth": layout.depth,
                    "sample_size": layout.sample_size,
                    **record,
                    "top1_or_ppl": sum(reached) / len(reached) if reached else None,
                }
                records.append(record)
                quality = (
                    ""
                    if not reached
                    else f"{record['top1_or_ppl']:.1f}"
                    if is_text
                    else f"{record['top1_or_ppl']:.1%}"
                )
                print(
                    f"| {name} | {design} | {layout.depth} | {layout.sample_size} | {record['bytes_per_row']:.0f} "
                    f"| {record['angle_deg']:.1f}° | {record['error']:.3f} | {record['bias2']:.4f} | {quality} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
