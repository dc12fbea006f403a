"""Students of DIS against students of exact distillation at the same learning rates: five tasks.

    python benchmarks/parity.py --teacher runs/glyphs/teacher --json parity.jsonl --seeds 0 1 2
    python benchmarks/parity.py --tasks text --text_teacher runs/clm/_teacher --json parity.jsonl --seeds 0 1 2

glyphs: the task of examples/run_glyphs.py, 3,375 characters, 4 epochs. glyphs_cached: the same without augmentation,
from stored targets; exact distillation has the loaded teacher. text: the task of examples/run_clm.py, 32,000 tokens,
180 steps. A rate of these tasks is the head's learning rate as a multiple of the body's.

text_trained: text, 80 steps, from a student that was trained on labels for 360 steps. text_tied: the same with a tied
head. A rate of these tasks is the learning rate of all parameters.

exact: all classes. dis: the defaults, by which the head is row-sparse. dis dense: the same with a dense head.
All else is the default, and all methods of a task have the same batches. A line is written for each student. A run
that is in the file already is not run again. Every call prints the table of the file's records: means over seeds, and
the difference to exact distillation.

--settings tries other settings of DISConfig in place of the defaults. They are a method of their own, by --name. With
probe_steps among them, records have the estimated and the probed error of the gradient at every log, and the table is
followed by their ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from statistics import mean, median
from typing import Any

from common import append, command, header, machine, parse, parser, read, row
from parity_tasks import MakeTrainer, glyphs, glyphs_cached, text, text_tied, text_trained
from students import by_setting
from transformers import set_seed
from transformers.utils import logging

from hf_dis import DISDistillationTrainer

TASKS = {"glyphs": glyphs, "glyphs_cached": glyphs_cached, "text": text}
TASKS |= {"text_trained": text_trained, "text_tied": text_tied}
HEAD_RATES, ALL_RATES = (1.0, 5.0, 20.0), (3e-4, 1e-3)
RATES = {"glyphs": HEAD_RATES, "glyphs_cached": (1.0, 20.0), "text": (1.0, 8.0, 32.0)}
RATES |= {"text_trained": ALL_RATES, "text_tied": ALL_RATES}
METHODS = {
    "exact": {"head_mode": "exact"},
    "dis": {},
    "dis dense": {"row_sparse_head": False},
}


def train(make: MakeTrainer, rate: float, settings: dict[str, Any], seed: int, use_cpu: bool) -> dict[str, Any]:
    """Trains and evaluates one student."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(rate, output_dir=folder, seed=seed, disable_tqdm=True, use_cpu=use_cpu, **settings)
        set_seed(seed)
        trainer.train()
        metrics = trainer.evaluate()
    found = {"logits": mean_logits(trainer), "kl": metrics["eval_kl"], "top1": metrics.get("eval_top1")}
    errors = [
        (log["dis/gradient_error"], log["probe/relative_error"])
        for log in trainer.state.log_history
        if "probe/relative_error" in log
    ]
    return found | ({"errors": errors} if errors else {})


def mean_logits(trainer: DISDistillationTrainer) -> float:
    """The share of the student's logits that the steps computed: the mean over logs, where it changes."""
    distiller, names = trainer.distiller, ("dis/num_sampled_classes", "dis/num_shared_classes")
    if distiller.mode == "exact":
        return 1.0
    sampler, logs = distiller.sampler, [log for log in trainer.state.log_history if names[0] in log]
    stored = sampler.columns - sampler.num_sampled - sampler.num_shared
    sizes = [stored + sum(log[name] for name in names) for log in logs]
    return mean(sizes or [sampler.columns]) / distiller.num_classes


def print_table(records: list[dict]) -> None:
    """Means over seeds, and the difference to exact distillation over the seeds that both have."""
    print(header("task", "rate", "method", "logits", "seeds", "top-1", "KL", "top-1 - exact", "KL / exact"))
    cells = by_setting(records, ("task", "rate", "method"))
    for (task, rate, method), runs in sorted(cells.items()):
        exact = cells.get((task, rate, "exact"), {})
        both = sorted(set(runs) & set(exact))
        top1, kl = (_mean(runs.values(), name) for name in ("top1", "kl"))
        against: list[str | None] = [None, None]
        if both and method != "exact":
            mine, theirs = ([side[seed] for seed in both] for side in (runs, exact))
            against = [_points(mine, theirs), f"{_mean(mine, 'kl') / _mean(theirs, 'kl'):.3f}"]
        logits = _mean(runs.values(), "logits")
        quality = None if top1 is None else f"{top1:.1%}", f"{kl:.4f}"
        at = f"x{rate:g}" if rate >= 1 else f"{rate:g}"
        print(row(task, at, method, f"{logits:.1%}", len(runs), *quality, *against))


def print_errors(records: list[dict]) -> None:
    """The ratios of the estimated to the probed error of the gradient, over the probes of all seeds."""
    cells = by_setting([one for one in records if "errors" in one], ("task", "rate", "method"))
    if cells:
        print(header("task", "rate", "method", "probes", "median of estimated / probed", "lowest", "highest"))
    for (task, rate, method), runs in sorted(cells.items()):
        ratios = [estimated / probed for one in runs.values() for estimated, probed in one["errors"]]
        shown = (f"{value:.2f}" for value in (median(ratios), min(ratios), max(ratios)))
        print(row(task, f"x{rate:g}" if rate >= 1 else f"{rate:g}", method, len(ratios), *shown))


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
    made.add_argument("--folder", default="runs/parity", help="for teachers and students that are trained first")
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
        teacher = given.teacher if task.startswith("glyphs") else given.text_teacher
        make = TASKS[task](teacher, given.folder)
        for key in wanted:
            _, rate, method, seed = key
            record = train(make, rate, methods[method], seed, given.device.type == "cpu")
            described = dict(zip(("task", "rate", "method", "seed"), key, strict=True))
            append(given.json, {**described, "command": command(), **record}, given.device)
    print_table(read(given.json))
    print_errors(read(given.json))


if __name__ == "__main__":
    main()
