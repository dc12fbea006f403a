"""The two tasks of cache_quality.py: a teacher, its data, and the settings of its students."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, default_data_collator

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import clm_task
import glyph_task

from hf_dis import DISConfig
from hf_dis.data import load_glyphs
from hf_dis.metrics import TopKAccuracy

BLOCK_TOKENS = 128
# Ranked classes and stored samples, the defaults of cache_teacher_targets, which set the bytes of every design.
LAYOUTS = {"glyphs": (32, 120), "text": (2, 23)}


@dataclass
class Task:
    """A teacher, its data, and the settings of its students.

    Attributes:
        name: a key of ``LAYOUTS``.
        teacher: trained.
        student: makes one.
        train_dataset, eval_dataset, collator: the data.
        temperature: τ.
        settings: of DISConfig; ``use_cpu`` among them.
        snapshots: steps of exact distillation after which the designs are compared.
        metrics: keyword arguments of the trainer.
    """

    name: str
    teacher: PreTrainedModel
    student: Callable[[], PreTrainedModel]
    train_dataset: Any
    eval_dataset: Any
    collator: Callable
    temperature: float
    settings: dict[str, Any]
    snapshots: tuple[int, ...]
    metrics: dict[str, Any]

    def arguments(self, folder: str, **changes: Any) -> DISConfig:
        """The configuration of a student that computes every logit."""
        return DISConfig(
            output_dir=folder,
            temperature=self.temperature,
            hard_label_weight=0.0,
            head_mode="exact",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_drop_last=True,
            logging_steps=100,
            **{**self.settings, **changes},
        )


def glyphs(teacher: str | None, epochs: float, device: torch.device) -> Task:
    """Characters as images, not augmented, at temperature 2.

    Args:
        teacher: saved by run_glyphs.py; None: it is trained first.
        epochs: of a student.
        device: of the teacher and of the trainings.
    """
    splits = load_glyphs()
    num_classes = splits["train"].features["label"].num_classes
    if teacher:
        model = glyph_task.load_teacher(teacher)
    else:
        model = glyph_task.build_teacher(num_classes)
        glyph_task.train_teacher(model, glyph_task.load_task()[0], 8, "runs/cache_quality/teacher")
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
        "use_cpu": device.type == "cpu",
    }
    metrics = {
        "compute_metrics": lambda predicted: TopKAccuracy().compute(
            predictions=predicted.predictions, references=predicted.label_ids
        ),
        "preprocess_logits_for_metrics": lambda logits, labels: logits.topk(5).indices,
    }
    return Task(
        "glyphs",
        model.to(device),
        lambda: glyph_task.build_student(num_classes),
        glyph_task.GlyphImages(splits["train"], glyph_task.NORMALISE),
        glyph_task.GlyphImages(splits["test"], glyph_task.NORMALISE),
        glyph_task.whole_batch,
        temperature=2.0,
        settings=settings,
        snapshots=(0, 100, 400),
        metrics=metrics,
    )


def text(teacher: str | None, steps: int, device: torch.device) -> Task:
    """The text of Python's standard library, at temperature 1.

    Args:
        teacher: saved with its tokenizer; None: it is trained first.
        steps: of a student.
        device: of the teacher and of the trainings.
    """
    texts = clm_task.load_texts()
    if teacher:
        tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    else:
        tokenizer = clm_task.train_tokenizer(texts["train"], 32_000)
    blocks = clm_task.tokenized(texts, tokenizer, BLOCK_TOKENS)
    if not teacher:
        args = DISConfig(
            output_dir="runs/cache_quality", disable_tqdm=True, report_to="none", use_cpu=device.type == "cpu"
        )
        model = clm_task.train_teacher(blocks["train"], tokenizer, 400, args)
    settings = {
        "max_steps": max(1, steps),
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "use_cpu": device.type == "cpu",
    }
    # As many blocks as the student is going to see, and no more.
    used = blocks["train"].shuffle(seed=0).select(range(8 * max(16, steps)))
    return Task(
        "text",
        model.to(device),
        lambda: clm_task.build_student(len(tokenizer)),
        used,
        blocks["validation"].select(range(min(256, len(blocks["validation"])))),
        default_data_collator,
        temperature=1.0,
        settings=settings,
        snapshots=(0, 40),
        metrics={},
    )
