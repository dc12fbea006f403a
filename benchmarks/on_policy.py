"""Distillation on the student's own text: students of DIS and of exact distillation, and the time of their steps.

    python benchmarks/on_policy.py --json on_policy.jsonl --seeds 0 1 2
    python benchmarks/on_policy.py --json on_policy.jsonl --seeds  # prints what the file has
    python benchmarks/on_policy.py --time --json on_policy_time.json

Students: the task of examples/run_on_policy.py, 32,000 tokens, 50 steps of 16 prompts, from a student trained by SFT.
A rate is the head's learning rate as a multiple of the body's, 1e-3. Methods:

exact           all tokens of the vocabulary
dis             all defaults: the head is row-sparse
dis started     as dis, and a tenth of the steps exact, in which the proposals learn
dis dense       the default layout, a dense gradient of the head
dis all rows    as dis, and every sampled row is updated
dis 2048        as dis, with tails of 2,048 tokens
dis 4096        as dis, with tails of 4,096 tokens
dis example     the layout of the example: 4 tails of 4,096 shared tokens, a tenth of the steps exact

A line is written for each student, and a run that is in the file already is not run again. Every call prints a table
of the file's records as means over seeds. The table has both KL divergences on the student's text for held-out
prompts, and the teacher's log-likelihood per token of that text.

--time: a whole training step without the writing, at 50,257 tokens and random weights: teacher, student, loss,
backward, clipping and optimizer, on --prompts completions of 64 tokens. The student has 2 layers, 128 wide, the
teacher 4 layers, 256 wide. trl is TRL's DistillationTrainer, the other methods are DISOnPolicyTrainer. The trainers
step in turn; ms is the median.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import append, command, header, is_saved, machine, parse, parser, read, row, write
from datasets import Dataset
from students import by_setting
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import run_on_policy
import sft_task
from clm_task import build_student
from on_policy_task import prompts_of, quality

from hf_dis.integrations.on_policy import DISOnPolicyConfig, DISOnPolicyTrainer

DIVERGENCES = ("reverse_kl", "jsd")
EXAMPLE = ("num_shared_classes", "num_tails", "row_sparse_head", "exact_warmup_steps")
METHODS = {
    "exact": {"head_mode": "exact"},
    "dis": {"head_mode": "sampled"},
    "dis started": {"head_mode": "sampled", "exact_warmup_steps": 0.1},
    "dis dense": {"head_mode": "sampled", "row_sparse_head": False},
    "dis all rows": {"head_mode": "sampled", "num_updated_classes": 1000},
    "dis 2048": {"head_mode": "sampled", "num_shared_classes": 2048},
    "dis 4096": {"head_mode": "sampled", "num_shared_classes": 4096},
    "dis example": {"head_mode": "sampled", **{name: run_on_policy.FROM_SCRATCH[name] for name in EXAMPLE}},
}
# Settings of run_on_policy.py besides those of the sample.
COMMON = {
    name: value
    for name, value in run_on_policy.FROM_SCRATCH.items()
    if name not in (*EXAMPLE, "methods", "head_mode", "head_learning_rate", "logging_steps")
}
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
EVAL_PROMPTS = 128
# Of --time.
VOCABULARY, FIRST_TOKEN, PROMPT_TOKENS, COMPLETION_TOKENS = 50_257, 1000, 16, 64


class OnPolicyTask:
    """Prompts, tokenizer, teacher and initial student; the models are kept in a folder.

    Args:
        folder: of the models, which are trained first if it has none.
        use_cpu: train on the processor.
    """

    def __init__(self, folder: str, use_cpu: bool):
        chats = sft_task.load_chats()
        prompts = prompts_of(chats)
        self.train, self.validation = prompts["train"], prompts["validation"].take(EVAL_PROMPTS)
        self.use_cpu, models = use_cpu, []
        teacher, student = (Path(folder) / name for name in ("_teacher", "_student"))
        steps = run_on_policy.OnPolicyExample()
        kept = is_saved(teacher) and is_saved(student)
        self.tokenizer = AutoTokenizer.from_pretrained(teacher) if kept else sft_task.chat_tokenizer(32_000)
        builders = (sft_task.build_teacher, steps.teacher_steps), (build_student, steps.student_steps)
        for path, (build, num_steps) in zip((teacher, student), builders, strict=True):
            if kept:
                models.append(AutoModelForCausalLM.from_pretrained(path))
                continue
            args = DISOnPolicyConfig(folder, use_cpu=use_cpu, bf16=False, gradient_checkpointing=False, **QUIET)
            given = chats, self.tokenizer, num_steps, args
            models.append(sft_task.fine_tuned(build(len(self.tokenizer)), path.name, *given, **run_on_policy.SFT))
        self.teacher, self.student = models

    def distilled(self, divergence: str, rate: float, seed: int, settings: dict[str, Any]) -> dict[str, float]:
        """Trains a student and measures what it writes."""
        with tempfile.TemporaryDirectory() as folder:
            rates = {"head_learning_rate": rate * COMMON["learning_rate"], "seed": seed, "use_cpu": self.use_cpu}
            args = DISOnPolicyConfig(folder, divergence=divergence, **{**COMMON, **QUIET, **rates, **settings})
            set_seed(seed)
            trainer = DISOnPolicyTrainer(
                copy.deepcopy(self.student),
                self.teacher,
                args,
                train_dataset=self.train,
                processing_class=self.tokenizer,
            )
            trainer.train()
            device, student = args.device, trainer.accelerator.unwrap_model(trainer.model)
            given = args.max_completion_length, args.per_device_train_batch_size, 0
            return quality(student, self.teacher.to(device), self.tokenizer, self.validation, *given)


def print_table(records: list[dict]) -> None:
    """Means over seeds, and the reverse KL's range."""
    print(header("divergence", "head rate", "method", "seeds", "KL(s, p)", "range", "KL(p, s)", "log-likelihood"))
    cells: dict[tuple, list[dict]] = {}
    for record in records:
        cells.setdefault((record["divergence"], record["rate"], record["method"]), []).append(record)
    for (divergence, rate, method), runs in sorted(cells.items()):
        means = [f"{statistics.mean(run[name] for run in runs):.3f}" for name in ("kl", "log_likelihood")]
        reverse = [run["reverse_kl"] for run in runs]
        spread = f"{statistics.mean(reverse):.3f}", f"{min(reverse):.3f} to {max(reverse):.3f}"
        print(row(divergence, f"x{rate:g}", method, len(runs), *spread, *means))


def print_best(records: list[dict]) -> None:
    """DIS against exact distillation by the reverse KL, each at its best rate, over the seeds that both have.

    The best rate is the one with the least mean over the seeds that all rates of the method have. The difference of
    the means is in units of its standard error, once for seeds that belong together and once for seeds that do not.
    """
    cells = by_setting(records, ("divergence", "method", "rate"))
    names = "exact at", "dis at", "seeds", "exact", "dis", "dis / exact", "difference by seed", "difference of means"
    rows = []
    for divergence in DIVERGENCES:
        rates = {
            method: {key[2]: runs for key, runs in cells.items() if key[:2] == (divergence, method)}
            for method in ("exact", "dis")
        }
        if all(rates.values()):
            best = {method: _best_rate(runs) for method, runs in rates.items()}
            runs = [rates[method][best[method]] for method in ("exact", "dis")]
            seeds = sorted(set(runs[0]) & set(runs[1]))
            if len(seeds) > 1:
                given = [[side[seed]["reverse_kl"] for seed in seeds] for side in runs]
                at = [f"x{best[method]:g}" for method in ("exact", "dis")]
                rows.append(row(divergence, *at, len(seeds), *_difference(*given)))
    if rows:
        print(header("divergence", *names), *rows, sep="\n")


def _best_rate(runs: dict[float, dict[int, dict]]) -> float:
    """The rate with the least mean reverse KL over the seeds that all rates have."""
    seeds = set.intersection(*map(set, runs.values()))
    return min(runs, key=lambda rate: statistics.mean(runs[rate][seed]["reverse_kl"] for seed in seeds))


def _difference(exact: list[float], dis: list[float]) -> list[str]:
    """Both means, their ratio, and their difference in standard errors: by seed, and of independent means."""
    means, number = (statistics.mean(exact), statistics.mean(dis)), len(exact)
    by_seed = statistics.variance([mine - theirs for mine, theirs in zip(dis, exact, strict=True)])
    errors = (by_seed / number) ** 0.5, ((statistics.variance(exact) + statistics.variance(dis)) / number) ** 0.5
    shown = [f"{(means[1] - means[0]) / error:.1f}" if error else "" for error in errors]
    return [*(f"{value:.4f}" for value in means), f"{means[1] / means[0]:.3f}", *shown]


class WithoutWriting(TrainerCallback):
    """Times the steps of a trainer, less the time in which the student writes.

    Args:
        trainer: whose method that generates is timed.
    """

    def __init__(self, trainer: DistillationTrainer):
        self.milliseconds: list[float] = []
        self._writing, generate = 0.0, trainer._generate_and_score_completions

        def timed(*args: Any) -> dict[str, Any]:
            started = time.perf_counter()
            try:
                return generate(*args)
            finally:
                self._writing += time.perf_counter() - started

        trainer._generate_and_score_completions = timed

    def on_step_begin(self, args, state, control, **kwargs):
        self._started, self._writing = time.perf_counter(), 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.milliseconds.append(1000 * (time.perf_counter() - self._started - self._writing))


def timed_steps(method: str, divergence: str, steps: int, prompts: int, tokenizer: Any, use_cpu: bool) -> list[float]:
    """Milliseconds of the steps of a trainer without the writing; the first step, which makes moments, is left out."""
    torch.manual_seed(0)
    prompt = tokenizer.decode(range(FIRST_TOKEN, FIRST_TOKEN + PROMPT_TOKENS))
    data = Dataset.from_dict({"prompt": [prompt] * prompts})
    common = {
        "max_steps": steps + 1,
        "max_completion_length": COMPLETION_TOKENS,
        "per_device_train_batch_size": prompts,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": use_cpu,
        **QUIET,
    }
    models = build_student(VOCABULARY), sft_task.build_teacher(VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        if method == "trl":
            args = DistillationConfig(folder, beta={"reverse_kl": 1.0, "jsd": 0.5}[divergence], **common)
            trainer = DistillationTrainer(
                models[0], teacher_model=models[1], args=args, train_dataset=data, processing_class=tokenizer
            )
        else:
            args = DISOnPolicyConfig(folder, divergence=divergence, **common, **METHODS[method])
            trainer = DISOnPolicyTrainer(*models, args, train_dataset=data, processing_class=tokenizer)
        times = WithoutWriting(trainer)
        trainer.add_callback(times)
        trainer.train()
    return times.milliseconds[1:]


def measure_times(given: argparse.Namespace, use_cpu: bool) -> list[dict]:
    """Records of the median step by each method and divergence, the methods in turn."""
    tokenizer = sft_task.chat_tokenizer(32_000)
    methods, records = ("trl", "exact", "dis", "dis dense"), []
    for prompts, divergence in product(given.prompts, given.divergences):
        times: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(given.rounds):
            for method in methods:
                times[method] += timed_steps(method, divergence, given.steps, prompts, tokenizer, use_cpu)
        medians = {method: statistics.median(values) for method, values in times.items()}
        for method, ms in medians.items():
            tokens, ratio = prompts * COMPLETION_TOKENS, f"{ms / medians['dis']:.2f}"
            described = {"divergence": divergence, "tokens": tokens, "method": method, "vocab": VOCABULARY}
            records.append({**described, "command": command(), "ms": ms})
            print(row(divergence, f"{tokens:,}", method, f"{ms:,.0f}", ratio), flush=True)
    return records


def arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=["exact", "dis"])
    made.add_argument("--rates", nargs="+", type=float, default=[1.0, 4.0], help="of the head")
    made.add_argument("--seeds", nargs="*", type=int, default=[0], help="none: print the file's table alone")
    made.add_argument("--folder", default="runs/on_policy_models", help="of teacher and initial student")
    made.add_argument("--time", action="store_true", help="time steps, and train no student")
    made.add_argument("--prompts", nargs="+", type=int, default=[16, 48], help="of --time")
    made.add_argument("--steps", type=int, default=4, help="of --time, per method and round")
    made.add_argument("--rounds", type=int, default=4, help="of --time")
    given = parse(made)
    if given.json is None and not given.time:
        made.error("--json is needed: the file of the records, which a later call continues")
    return given


def main() -> None:
    given = arguments()
    logging.set_verbosity_error()
    print(machine(given.device), flush=True)
    use_cpu = given.device.type == "cpu"
    if given.time:
        print(header("divergence", "tokens", "method", "ms", "method / dis"))
        write(measure_times(given, use_cpu), given.json, given.device)
        return
    names = ("divergence", "rate", "method", "seed")
    done = {tuple(one[name] for name in names) for one in read(given.json)}
    wanted = [
        (divergence, rate, method, seed)
        for seed in given.seeds
        for divergence in given.divergences
        for rate in given.rates
        for method in given.methods
    ]
    wanted = [key for key in wanted if key not in done]
    task = OnPolicyTask(given.folder, use_cpu) if wanted else None
    for key in wanted:
        divergence, rate, method, seed = key
        record = task.distilled(divergence, rate, seed, METHODS[method])
        described = dict(zip(names, key, strict=True))
        append(given.json, {**described, "command": command(), **record}, given.device)
    print_table(read(given.json))
    print_best(read(given.json))


if __name__ == "__main__":
    main()
