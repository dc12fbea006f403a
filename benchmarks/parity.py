"""Students of DIS against students of exact distillation at the same learning rates: two tasks from scratch.

    python benchmarks/parity.py --teacher runs/glyphs/teacher --json parity.jsonl --seeds 0 1 2
    python benchmarks/parity.py --tasks text --text_teacher runs/clm/_teacher --json parity.jsonl --seeds 0 1 2

glyphs: the task of examples/run_glyphs.py, 3,375 characters, 4 epochs. text: that of examples/run_clm.py, 32,000
tokens, 180 steps. A rate is the head's learning rate as a multiple of the body's. All else is the default, and all
methods of a task have the same batches. A line is written for each student. A run that is in the file already is not
run again. Every call prints the table of the file's records: means over seeds, and the difference to exact
distillation.

--settings tries other settings of DISConfig in place of the defaults. They are a method of their own, by --name.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from common import append, header, machine, parse, parser, read, row
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import clm_task
import glyph_task
import run_clm

from hf_dis import DISConfig, DISDistillationTrainer

RATES = {"glyphs": (1.0, 5.0, 20.0), "text": (1.0, 8.0, 32.0)}
METHODS = {
    "exact": {"head_mode": "exact"},
    "dis": {},
    "dis row-sparse": {"row_sparse_head": True},
}
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

# Makes the trainer of a student from a head rate and settings of DISConfig.
MakeTrainer = Callable[..., DISDistillationTrainer]


def glyphs(teacher: str | None, folder: str) -> MakeTrainer:
    """The trainers of the glyph task.

    Args:
        teacher: saved by run_glyphs.py; None: it is trained first, into ``folder``.
        folder: for the teacher.
    """
    task = glyph_task.load_task()
    if teacher:
        model = glyph_task.load_teacher(teacher)
    else:
        model = glyph_task.build_teacher(len(task[2]))
        glyph_task.train_teacher(model, task[0], 8, folder)
        model.save_pretrained(folder)
    return lambda rate, **settings: glyph_task.student_trainer(model, task, rate, **settings)


def text(teacher: str | None, folder: str) -> MakeTrainer:
    """The trainers of the text task.

    Args:
        teacher: saved with its tokenizer, by run_clm.py; None: it is trained first, into ``folder``.
        folder: for the teacher.
    """
    texts = clm_task.load_texts()
    if teacher:
        tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    else:
        tokenizer = clm_task.train_tokenizer(texts["train"], 32_000)
    blocks = clm_task.tokenized(texts, tokenizer, BLOCK_TOKENS)
    if not teacher:
        args = DISConfig(output_dir=folder, disable_tqdm=True, report_to="none", use_cpu=True)
        model = clm_task.train_teacher(blocks["train"], tokenizer, run_clm.ClmArguments().teacher_steps, args)
    common = {name: run_clm.FROM_SCRATCH[name] for name in TEXT_SETTINGS}

    def make(rate: float, **settings: Any) -> DISDistillationTrainer:
        rates = {"head_learning_rate": rate * common["learning_rate"], "save_strategy": "no", "report_to": "none"}
        return DISDistillationTrainer(
            model=clm_task.build_student(len(tokenizer)),
            teacher_model=model,
            args=DISConfig(**{**common, **rates, **settings}),
            train_dataset=blocks["train"],
            eval_dataset=blocks["validation"].take(EVAL_BLOCKS),
            processing_class=tokenizer,
            data_collator=default_data_collator,
        )

    return make


def train(make: MakeTrainer, rate: float, settings: dict[str, Any], seed: int, use_cpu: bool) -> dict[str, Any]:
    """Trains and evaluates one student."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(rate, output_dir=folder, seed=seed, disable_tqdm=True, use_cpu=use_cpu, **settings)
        set_seed(seed)
        trainer.train()
        metrics = trainer.evaluate()
    distiller = trainer.distiller
    exact = distiller.mode == "exact"
    logits = distiller.num_classes if exact else distiller.sampler.columns
    return {"logits": logits / distiller.num_classes, "kl": metrics["eval_kl"], "top1": metrics.get("eval_top1")}


def print_table(records: list[dict]) -> None:
    """Means over seeds, and the difference to exact distillation over the seeds that both have."""
    print(header("task", "head rate", "method", "logits", "seeds", "top-1", "KL", "top-1 - exact", "KL / exact"))
    cells = {}
    for record in records:
        key = record["task"], record["rate"], record["method"]
        cells.setdefault(key, {})[record["seed"]] = record
    for (task, rate, method), runs in sorted(cells.items()):
        exact = cells.get((task, rate, "exact"), {})
        both = sorted(set(runs) & set(exact))
        top1, kl = (_mean(runs.values(), name) for name in ("top1", "kl"))
        against: list[str | None] = [None, None]
        if both and method != "exact":
            mine, theirs = ([side[seed] for seed in both] for side in (runs, exact))
            against = [_points(mine, theirs), f"{_mean(mine, 'kl') / _mean(theirs, 'kl'):.3f}"]
        logits = next(iter(runs.values()))["logits"]
        quality = None if top1 is None else f"{top1:.1%}", f"{kl:.4f}"
        print(row(task, f"x{rate:g}", method, f"{logits:.1%}", len(runs), *quality, *against))


def _mean(records: Any, name: str) -> float | None:
    values = [record[name] for record in records]
    return None if None in values else mean(values)


def _points(mine: list[dict], theirs: list[dict]) -> str | None:
    """The difference in top-1, in points."""
    top1 = _mean(mine, "top1")
    return None if top1 is None else f"{100 * (top1 - _mean(theirs, 'top1')):+.1f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--tasks", nargs="+", choices=list(RATES), default=list(RATES))
    made.add_argument("--teacher", help="of the glyphs, saved by examples/run_glyphs.py; trained first if not given")
    made.add_argument("--text_teacher", help="of the text, with its tokenizer; trained first if not given")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--rates", nargs="+", type=float, help="of the head; three of each task if not given")
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--name", help="of the method that --settings describe")
    made.add_argument("--settings", type=json.loads, help="of DISConfig, as JSON; in place of --methods")
    made.add_argument("--folder", default="runs/parity", help="for teachers that are trained first")
    given = parse(made)
    if (given.settings is None) != (given.name is None):
        made.error("--settings and --name belong together: give both or neither")
    if given.json is None:
        made.error("--json is needed: the file of the records, which a later call continues")
    return given


def main() -> None:
    given = arguments()
    logging.set_verbosity_error()
    print(machine(given.device), flush=True)
    methods = {name: METHODS[name] for name in given.methods} if given.name is None else {given.name: given.settings}
    done = {tuple(one[name] for name in ("task", "rate", "method", "seed")) for one in read(given.json)}
    for task in given.tasks:
        wanted = [
            (task, rate, method, seed)
            for seed in given.seeds
            for rate in given.rates or RATES[task]
            for method in methods
            if (task, rate, method, seed) not in done
        ]
        if not wanted:
            continue
        teachers = {"glyphs": given.teacher, "text": given.text_teacher}
        make = {"glyphs": glyphs, "text": text}[task](teachers[task], f"{given.folder}/{task}_teacher")
        for key in wanted:
            _, rate, method, seed = key
            record = train(make, rate, methods[method], seed, given.device.type == "cpu")
            described = dict(zip(("task", "rate", "method", "seed"), key, strict=True))
            append(given.json, {**described, **record}, given.device)
    print_table(read(given.json))


if __name__ == "__main__":
    main()
