"""Students of a vocabulary of 150,000 to 262,144 tokens on real text: DIS against exact KD, by steps and by seconds.

    python benchmarks/large_vocabulary.py --tokenizer gemma3/tokenizer.json --texts novels/*.txt --json gemma.jsonl
    python benchmarks/large_vocabulary.py --json gemma.jsonl  # prints and plots what the file has

The texts are files, the last twentieth of which is held out. The teacher and the initial student are trained first on
labels, by sampled softmax with logQ, and kept in --folder. Both are small Llamas whose heads are tied to their
embeddings. All students start from the same weights and see the same blocks of 128 tokens once. Methods:

exact          exact KD, in blocks of items and classes
dis            DIS, the defaults
dis_1024       DIS with tails of 1,024 tokens, the default up to 185,000 tokens
dis_4096       DIS with tails of 4,096 tokens
dis_cached     DIS from a cache of the teacher's targets; its time has the writing of the cache, which is given apart
topk           KD on the teacher's 2,064 likeliest tokens, as many as DIS samples per token
topk_bucket    the same, and a bucket of all other tokens
negatives      KD on the labels of a batch and uniform negatives, 2,064 tokens in all, as PartialFC takes them
trl_chunked    exact KD by TRL's chunked divergence
liger          exact KD by Liger's chunked loss, if it is installed
exact_in_time  exact KD for the time that DIS took with the same seed

A line is written for each student, and a run that is in the file already is not run again. A line has KL to the
teacher and perplexity on held-out blocks, at the end and as a curve by steps and by seconds of training. On a
processor the methods are compared by processor time, cpu_seconds, which other work on the machine changes less.
peak_mb is the most memory that a step takes beyond weights and moments, on a processor measured on Linux only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import peer_students
import students
from common import append, command, header, is_saved, machine, parse, parser, read, row
from datasets import DatasetDict, load_dataset
from peers import NEEDS
from step_memory import StepMemory
from students import CLOCKS, clock_of, seconds_per_step
from timing import available
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import clm_plots
import clm_task
import item_cache
import item_task

from hf_dis import DISConfig, DISDistillationTrainer, Distiller

KEY = ("tokenizer", "width", "max_steps", "learning_rate", "method", "seed")
COLUMNS = 2064  # of DIS at 262,144 tokens: 16 ranked ones and 2,048 of a tail
PEERS = peer_students.losses(COLUMNS)
METHODS = ("exact", "dis", "dis_1024", "dis_4096", "dis_cached", "topk", *PEERS, "exact_in_time")
BLOCK, BATCH = 128, 4
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "temperature": 1.0,
    "hard_label_weight": 0.0,
    "head_mode": "sampled",
    "save_strategy": "no",
    "eval_strategy": "steps",
    "disable_tqdm": True,
    "report_to": "none",
}
EXACT = {"head_mode": "exact"}
TOP_K = {"proposal": "topk", "num_sampled_classes": COLUMNS, "num_shared_classes": 0, "num_tails": None}
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "exact": EXACT,
    "exact_in_time": EXACT,
    "dis_1024": {"num_shared_classes": 1024},
    "dis_4096": {"num_shared_classes": 4096},
    "topk": TOP_K,
    **dict.fromkeys(PEERS, EXACT),
}
# Of the trainings on labels: blocks per step, and the learning rate.
LABEL_BATCH, LABEL_RATE = 16, 2e-3


def load_texts(files: list[str]) -> DatasetDict:
    """Reads each file as one text, and holds out the last twentieth of them.

    Raises:
        ValueError: if there are fewer than two files.
    """
    if len(files) < 2:
        raise ValueError(f"--texts has {len(files)} file: give two or more, of which the last twentieth is held out")
    texts = load_dataset("text", data_files=files, sample_by="document", encoding_errors="replace")["train"]
    parts = texts.train_test_split(test_size=max(1, round(clm_task.HELD_OUT * len(texts))), shuffle=False)
    return DatasetDict(train=parts["train"], validation=parts["test"])


class LargeVocabulary:
    """The texts as blocks, the teacher, the initial student and the settings of all students.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace):
        self.given, self.use_cpu = given, given.device.type == "cpu"
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(given.tokenizer))
        self.num_tokens = len(tokenizer)
        blocks = clm_task.tokenized(load_texts(given.texts), tokenizer, BLOCK)
        self.blocks = blocks["train"].shuffle(seed=0)
        self.validation = blocks["validation"].take(min(given.eval_blocks, len(blocks["validation"])))
        needed = given.steps * BATCH
        if len(self.blocks) < needed:
            raise ValueError(
                f"{given.steps} steps take {needed:,} blocks of {BLOCK} tokens, and the texts have "
                f"{len(self.blocks):,}: give more texts, or fewer --steps"
            )
        self.train = self.blocks.take(needed)
        print(f"{self.num_tokens:,} tokens, {len(self.blocks):,} blocks of {BLOCK} to train on", flush=True)
        teacher = "_teacher", given.teacher_width, 0, given.teacher_steps
        sizes = teacher, ("_student", given.width, 1, given.student_steps)
        self.teacher, self.student = (self._trained_on_labels(*size) for size in sizes)

    def _trained_on_labels(self, name: str, width: int, seed: int, steps: int) -> LlamaForCausalLM:
        """A model of the folder, or a new one."""
        path = self.given.folder / name
        if is_saved(path):
            return LlamaForCausalLM.from_pretrained(path).to(self.given.device)
        print(f"Training {name[1:]} on labels for {steps} steps ...", flush=True)
        args = TrainingArguments(
            str(path),
            max_steps=steps,
            per_device_train_batch_size=LABEL_BATCH,
            learning_rate=LABEL_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.0,
            save_strategy="no",
            logging_steps=50,
            use_cpu=self.use_cpu,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = item_task.SampledSoftmaxTrainer(
            model=clm_task.build_model(self.num_tokens, width, 2, seed, tied=True),
            args=args,
            train_dataset=self.blocks,
            data_collator=item_task.collate,
            counts=self._counts(),
        )
        trainer.train()
        trainer.save_model()
        return trainer.accelerator.unwrap_model(trainer.model)

    def _counts(self) -> np.ndarray:
        """The number of times that each token occurs in the training blocks, ``[C]``."""
        ids = self.blocks.with_format("numpy")["input_ids"][:]
        return np.bincount(np.asarray(ids).ravel(), minlength=self.num_tokens)

    def trained(self, method: str, learning_rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Trains a student for a number of steps, and evaluates it."""
        given = self.given
        own = OWN_SETTINGS.get(method, {})
        settings = {**SETTINGS, "eval_steps": max(1, steps // given.evaluations), **own}
        args = DISConfig(
            str(given.folder / "_runs"),
            max_steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            use_cpu=self.use_cpu,
            **settings,
        )
        set_seed(seed)
        clock, memory = item_task.TrainingClock(), StepMemory(given.device)
        source: dict[str, Any] = {"teacher_model": self.teacher}
        writing = dict.fromkeys(CLOCKS, 0.0)
        if method == "dis_cached":  # the teacher itself evaluates
            stored = item_cache.stored_targets(self.teacher, self.train, 1.0, given.folder / "_cache", BATCH)
            source["teacher_cache"] = stored.cache
            writing = {"seconds": stored.seconds, "cpu_seconds": stored.cpu_seconds}
            clock.add(**writing)
        student = clm_task.build_model(self.num_tokens, given.width, 2, seed=1, tied=True)
        student.load_state_dict(self.student.state_dict())
        is_peer = method in PEERS
        source |= {"loss": PEERS[method]} if is_peer else {}
        trainer = (peer_students.PeerTrainer if is_peer else DISDistillationTrainer)(
            model=student,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.validation,
            data_collator=item_task.collate,
            callbacks=[clock, memory],
            **source,
        )
        trainer.train()
        if clock.curve[-1]["step"] < steps:
            trainer.evaluate()
        distiller = trainer.distiller
        return {
            "vocab": self.num_tokens,
            "steps": steps,
            "logits": self._logits(method, distiller),
            **{name: clock.curve[-1][name] for name in (*CLOCKS, "kl", "perplexity")},
            **{f"writing_{name}": spent for name, spent in writing.items()},
            "peak_mb": memory.megabytes,
            "curve": clock.curve,
        }

    def _logits(self, method: str, distiller: Distiller) -> int:
        """Logits of the student per token."""
        if method == "negatives":
            return COLUMNS
        return self.num_tokens if distiller.mode == "exact" else distiller.sampler.columns


def steps_in_time(records: list[dict], key: dict[str, Any], clock: str) -> int:
    """The number of steps of exact KD in the time that DIS took.

    Args:
        records: of the file.
        key: of the run.
        clock: ``"seconds"`` or ``"cpu_seconds"``.

    Raises:
        ValueError: if a student that the number comes from is missing.
    """
    return students.steps_in_time(records, key, ("exact", "dis"), clock, f"seed {key['seed']}")


def print_table(records: list[dict]) -> None:
    """Means over seeds; ratios to exact KD are over the seeds that both have."""
    names = ("tokenizer", "vocabulary", "learning rate", "method", "seeds", "steps", "logits", "s per step")
    print(header(*names, "exact / method", "seconds", "peak MB", "KL", "KL / exact", "perplexity"))
    cells = students.by_setting(records, KEY[:-1])
    for key, runs in sorted(cells.items()):
        exact, some = cells.get((*key[:-1], "exact"), {}), list(runs.values())
        both = sorted(set(runs) & set(exact))
        clock = clock_of(some[0]["device"])
        mine, theirs = ([side[seed] for seed in both] for side in (runs, exact))
        ratios = [None, None]
        if both:
            theirs_per_mine = seconds_per_step(theirs, clock) / seconds_per_step(mine, clock)
            ratios = [
                f"{theirs_per_mine:.1f}",
                f"{mean(one['kl'] for one in mine) / mean(one['kl'] for one in theirs):.3f}",
            ]
        print(
            row(
                *(key[0], f"{some[0]['vocab']:,}", f"{key[3]:g}", key[4], len(runs)),
                f"{mean(one['steps'] for one in some):.0f}",
                f"{some[0]['logits']:,}",
                f"{seconds_per_step(some, clock):.2f}",
                ratios[0],
                f"{mean(one[clock] for one in some):.0f}",
                students.peak_cell(some),
                f"{mean(one['kl'] for one in some):.3f}",
                ratios[1],
                f"{mean(one['perplexity'] for one in some):.1f}",
            )
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--tokenizer", type=Path, help="the tokenizer.json of the vocabulary")
    made.add_argument("--texts", nargs="+", help="text files, UTF-8")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3], help="of all parameters")
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--steps", type=int, default=150, help="of a student, 512 tokens each")
    made.add_argument("--width", type=int, default=128, help="features of the student")
    made.add_argument("--teacher_width", type=int, default=256)
    made.add_argument("--teacher_steps", type=int, default=1500, help="on labels, 2,048 tokens each")
    made.add_argument("--student_steps", type=int, default=300, help="of the initial student, on labels")
    made.add_argument("--evaluations", type=int, default=6, help="points of a curve")
    made.add_argument("--eval_blocks", type=int, default=16, help="held-out blocks of 128 tokens")
    made.add_argument("--folder", type=Path, default=Path("runs/large_vocabulary"), help="of teacher and student")
    made.add_argument("--plot", type=Path, help="an image of the curves of the file's first seed and rate")
    given = parse(made)
    if given.json is None:
        made.error("--json is needed: the file of the records, which a later call continues")
    if (given.tokenizer is None) != (given.texts is None):
        made.error("--tokenizer and --texts belong together: give both, or neither to print the records of --json")
    if given.tokenizer is None and not given.json.exists():
        made.error(f"{given.json} has no records to print: give --tokenizer and --texts to train students")
    return given


def main() -> None:
    given = arguments()
    logging.set_verbosity_error()
    print(machine(given.device), flush=True)
    done = [{name: one[name] for name in KEY} for one in read(given.json)]
    wanted = []
    if given.tokenizer:
        methods = available(given.methods, NEEDS)
        common = given.tokenizer.resolve().parent.name, given.width, given.steps
        wanted = [
            dict(zip(KEY, (*common, rate, method, seed), strict=True))
            for seed in given.seeds
            for rate in given.learning_rates
            for method in (one for one in METHODS if one in methods)
        ]
        wanted = [key for key in wanted if key not in done]
    task = LargeVocabulary(given) if wanted else None
    for key in wanted:
        steps = given.steps
        if key["method"] == "exact_in_time":
            steps = steps_in_time(read(given.json), key, clock_of(given.device.type))
        record = task.trained(key["method"], key["learning_rate"], key["seed"], steps)
        append(given.json, {**key, "command": command(), **record}, given.device)
    records = read(given.json)
    print_table(records)
    if given.plot:
        alike = students.of_first(records, KEY)
        clm_plots.plot_curves(given.plot, alike, clock=clock_of(records[0]["device"]))


if __name__ == "__main__":
    main()
