"""Tasks of parity.py: makers of trainers whose students differ in a learning rate and in settings of DISConfig."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import is_saved
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import clm_task
import glyph_task
import run_clm

from hf_dis import DISConfig, DISDistillationTrainer, cache_teacher_targets

# Settings of run_clm.py besides those of the sample.
TEXT_SETTINGS = (
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "learning_rate",
    "warmup_steps",
    "lr_scheduler_type",
    "temperature",
    "hard_label_weight",
    "head_mode",
)
BLOCK_TOKENS, EVAL_BLOCKS = 128, 32
# The training on labels before the distillation, with the schedule of the teacher; then the steps of distillation.
LABEL_STEPS, TRAINED_STEPS = 360, 80
# Of all methods: the seeds of the students change the order of the data alone.
LABEL_SEED = 0

# Makes the trainer of a student from a rate and settings of DISConfig.
MakeTrainer = Callable[..., DISDistillationTrainer]


def glyphs(teacher: str | None, folder: str) -> MakeTrainer:
    """The trainers of the glyph task; the rate is the head's, as a multiple of the body's.

    Args:
        teacher: saved by run_glyphs.py; None: it is trained first, into ``folder``.
        folder: for the teacher.
    """
    task = glyph_task.load_task()
    model = _glyph_teacher(teacher, folder, task)
    return lambda rate, **settings: glyph_task.student_trainer(model, task, rate, **settings)


def glyphs_cached(teacher: str | None, folder: str) -> MakeTrainer:
    """As :func:`glyphs`, on images without augmentation, with stored targets for all but exact distillation."""
    task = glyph_task.load_task()
    model = _glyph_teacher(teacher, folder, task)
    train, test, names = task
    train.transform = glyph_task.NORMALISE
    common = {"data_collator": glyph_task.whole_batch, "batch_size": 256, "show_progress": False}
    # Another call finds the cache complete.
    cache = cache_teacher_targets(model, train, f"{folder}/glyph_cache", **common)

    def make(rate: float, **settings: Any) -> DISDistillationTrainer:
        stored = None if settings.get("head_mode") == "exact" else cache
        return glyph_task.student_trainer(model, (train, test, names), rate, stored, **settings)

    return make


def _glyph_teacher(teacher: str | None, folder: str, task: tuple) -> Any:
    path = Path(teacher or f"{folder}/glyph_teacher")
    if teacher is None and not is_saved(path):
        model = glyph_task.build_teacher(len(task[2]))
        glyph_task.train_teacher(model, task[0], 8, folder)
        model.save_pretrained(path)
    return glyph_task.load_teacher(path)


def text(teacher: str | None, folder: str) -> MakeTrainer:
    """The trainers of run_clm's task, from random weights; the rate is the head's, as a multiple of the body's.

    Args:
        teacher: saved with its tokenizer, by run_clm.py; None: it is trained first, into ``folder``.
        folder: for the teacher.
    """
    common = {name: run_clm.FROM_SCRATCH[name] for name in TEXT_SETTINGS}
    model, tokenizer, blocks = _text(teacher, folder)

    def make(rate: float, **settings: Any) -> DISDistillationTrainer:
        rates = {"head_learning_rate": rate * common["learning_rate"]}
        student = clm_task.build_student(len(tokenizer))
        return _text_trainer(student, model, tokenizer, blocks, {**common, **rates, **settings})

    return make


def text_trained(teacher: str | None, folder: str) -> MakeTrainer:
    """As :func:`text`, for a student trained on labels first; the rate is that of all parameters, 80 steps."""
    return _trained(teacher, folder, tied=False)


def text_tied(teacher: str | None, folder: str) -> MakeTrainer:
    """As :func:`text_trained`, with the head tied to the embedding."""
    return _trained(teacher, folder, tied=True)


def _trained(teacher: str | None, folder: str, tied: bool) -> MakeTrainer:
    common = {name: run_clm.FROM_SCRATCH[name] for name in TEXT_SETTINGS}
    model, tokenizer, blocks = _text(teacher, folder)
    path = Path(folder) / ("tied_student" if tied else "untied_student")
    if not is_saved(path):
        student = clm_task.build_model(len(tokenizer), width=128, num_layers=2, seed=1, tied=tied)
        args = DISConfig(output_dir=folder, disable_tqdm=True, report_to="none", use_cpu=model.device.type == "cpu")
        clm_task.train_on_labels(student, blocks["train"], tokenizer, LABEL_STEPS, args, str(path), LABEL_SEED)

    def make(rate: float, **settings: Any) -> DISDistillationTrainer:
        rates = {"learning_rate": rate, "max_steps": TRAINED_STEPS}
        student = AutoModelForCausalLM.from_pretrained(path)
        return _text_trainer(student, model, tokenizer, blocks, {**common, **rates, **settings})

    return make


def _text(teacher: str | None, folder: str) -> tuple[Any, Any, Any]:
    """The teacher, its tokenizer and the blocks of tokens of both splits."""
    texts = clm_task.load_texts()
    saved = Path(teacher or f"{folder}/_teacher")
    if teacher is None and not is_saved(saved):
        tokenizer = clm_task.train_tokenizer(texts["train"], 32_000)
        blocks = clm_task.tokenized(texts, tokenizer, BLOCK_TOKENS)
        args = DISConfig(output_dir=folder, disable_tqdm=True, report_to="none", use_cpu=True)
        clm_task.train_teacher(blocks["train"], tokenizer, run_clm.ClmArguments().teacher_steps, args)
    tokenizer, model = AutoTokenizer.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
    return model, tokenizer, clm_task.tokenized(texts, tokenizer, BLOCK_TOKENS)


def _text_trainer(student: Any, teacher: Any, tokenizer: Any, blocks: Any, settings: dict) -> DISDistillationTrainer:
    return DISDistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DISConfig(**{"save_strategy": "no", "report_to": "none", **settings}),
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"].take(EVAL_BLOCKS),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
