"""Students that recommend the next item: DIS, exact KD, top-K KD, and labels alone, by steps and by seconds.

    python benchmarks/items.py --interactions beauty.txt --json beauty.jsonl
    python benchmarks/items.py --simulate 1000000 --batch_users 16 --steps 100 --test_users 4000 --json million.jsonl
    python benchmarks/items.py --json beauty.jsonl  # prints and plots what the file has

The task is that of examples/run_next_item.py, on a file of a user and an item per line, or on users simulated by a
hidden Markov model. The teacher is trained first, on labels by sampled softmax with logQ, and kept in --folder. A rate
is that of the item embeddings as a multiple of the body's, 2e-3. Methods:

labels          labels only: sampled softmax, 4,096 negatives that a batch shares, logQ correction; sparse steps
exact           exact KD
dis             DIS, row_sparse_head
dis_cached      DIS from a cache of the teacher's targets; its time includes the writing of the cache
topk            KD on the teacher's 64 best-ranked items, row_sparse_head
topk_bucket     KD on the teacher's 1,040 best-ranked items and a bucket of all other items, see peer_students.py
negatives       KD on the batch's labels and uniform negatives, 1,040 items in all, see peer_students.py

exact_in_time and labels_in_time train for the time that DIS took with the same seed and rate. labels_in_cached_time
trains for the time of dis_cached.

A line is written for each student, and a run that is in the file already is not run again. A line has the scores of
the users' last items over all items, and a curve: the validation's scores by steps and by seconds of training. The
time of scoring and of measuring is left out. On a processor the in-time methods go by processor time, cpu_seconds,
which other work on the machine changes less.

top10_in_sample of a line is the share of the student's own ten best-ranked items that are in the sample. It is
measured for the first 64 items of a batch, and a line has the means between two logs. top10_in_tail is the share that
the shared tail holds. peak_mb is the most memory that a step takes beyond weights and moments, on a processor measured
on Linux only.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import peer_students
import students
import torch
from common import append, command, header, is_saved, machine, parse, parser, read, row
from datasets import Dataset
from step_memory import StepMemory
from students import CLOCKS, clock_of
from torch import Tensor
from transformers import LlamaForCausalLM, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import clm_plots
import item_cache
import item_data
import item_task
import run_next_item

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.metrics import top_ranked
from hf_dis.steps import SampledStep, Step, WarmupStep

KEY = ("data", "width", "batch_users", "max_steps", "rate", "method", "seed")
# Of a batch: the items whose best-ranked classes are looked for in the sample.
MEASURED_ITEMS = 64
# Methods of peers, with as many items as DIS has in a catalogue of 54,542.
PEER_ITEMS = 1040
PEERS = {"topk_bucket": peer_students.topk_bucket, "negatives": peer_students.negatives}
METHODS = (*run_next_item.METHODS, *PEERS)
SHARES = ("top10_in_sample", "top10_in_tail")


@torch.no_grad()
def shares_in_sample(model: LlamaForCausalLM, step: SampledStep | WarmupStep) -> dict[str, Tensor]:
    """The shares of the student's ten best-ranked items that are sampled: per item, ``[n]``.

    Args:
        model: the student.
        step: of a batch.
    """
    inputs = {name: step.inputs[name] for name in ("input_ids", "attention_mask")}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    features = step.items.of(hidden, slice(0, MEASURED_ITEMS))
    top = top_ranked(features, model.get_output_embeddings().weight, first_class=1)
    tails = step.sample.tail_ids
    tails = tails[torch.arange(len(top), device=top.device) % len(tails)]
    own, shared = ((top[:, :, None] == ids[:, None]).any(2) for ids in (step.sample.item_ids[: len(top)], tails))
    return dict(zip(SHARES, ((own | shared).double().mean(1), shared.double().mean(1)), strict=True))


class MeasuredTrainer(DISDistillationTrainer):
    """Adds the shares of :func:`shares_in_sample` to the logs.

    Args:
        curve: from whose seconds the time of the measurement is left out.
        *args, **kwargs: as for :class:`hf_dis.DISDistillationTrainer`.
    """

    def __init__(self, *args: Any, curve: item_task.RankingCurve, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.curve = curve

    def _quality(self, step: Step) -> dict[str, Any]:
        values = super()._quality(step)
        if isinstance(step, SampledStep | WarmupStep):
            with self.curve.paused():
                values |= shares_in_sample(self._student, step)
        return values


class Catalogue:
    """The interactions, the teacher and the settings of all students.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace):
        self.given = given
        if given.interactions:
            self.data = item_data.read_interactions(given.interactions)
        else:
            self.data = item_data.simulate(given.simulate, given.users)
        print(*self.data.facts(), sep="\n", flush=True)
        self.windows = self.data.training(given.max_length)
        self.test, self.validation = (
            self._some_users(split, number)
            for split, number in (("test", given.test_users), ("validation", given.eval_users))
        )
        self.use_cpu = given.device.type == "cpu"
        self.teacher = self._teacher().to(given.device)

    def _some_users(self, split: str, number: int | None) -> Dataset:
        """The users of a split, or so many of them, always the same."""
        users = self.data.held_out(split, self.given.max_length)
        return users if number is None else users.shuffle(seed=0).take(min(number, len(users)))

    def args(self, folder: Path, **settings: Any) -> DISConfig:
        """The settings of a student."""
        given = self.given
        own = {
            "per_device_train_batch_size": given.batch_users,
            "max_steps": given.steps,
            "logging_steps": max(1, given.steps // given.evaluations),
            "use_cpu": self.use_cpu,
            "disable_tqdm": True,
            "report_to": "none",
        }
        return DISConfig(str(folder), **{**run_next_item.DEFAULTS, **own, **settings})

    def _teacher(self) -> LlamaForCausalLM:
        """The teacher of the folder, or a new one, whose scores are printed."""
        given = self.given
        sizes = {"teacher_width": given.teacher_width, "teacher_steps": given.teacher_steps}
        kept = given.folder / "_teacher"
        name = str(kept) if is_saved(kept) else None
        arguments = run_next_item.ItemArguments(teacher_model_name_or_path=name, max_length=given.max_length, **sizes)
        teacher = run_next_item.load_teacher(arguments, self.args(given.folder), self.data)
        if name is None:
            print("teacher:", item_task.scores(teacher, self.test), flush=True)
        return teacher

    def trained(self, method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Trains a student for a number of steps, and scores it."""
        rates = {"head_learning_rate": rate * run_next_item.DEFAULTS["learning_rate"]}
        args = self.args(self.given.folder, seed=seed, **rates)
        args.max_steps = steps
        set_seed(seed)
        student = item_task.build(self.data.num_classes, self.given.width, 2, seed=1 + seed)
        curve = item_task.RankingCurve(self.validation, max(1, steps // self.given.evaluations))
        memory = StepMemory(self.given.device)
        teacher, writing = self.teacher, dict.fromkeys(CLOCKS, 0.0)
        if method == "dis_cached":
            stored = item_cache.stored_targets(teacher, self.windows, args.temperature, self.given.folder / "_cache")
            teacher, writing = stored.cache, {"seconds": stored.seconds, "cpu_seconds": stored.cpu_seconds}
            curve.add(**writing)
        if method in PEERS:
            loss = partial(PEERS[method], k=PEER_ITEMS, hard_label_weight=args.hard_label_weight)
            trainer_class, like = partial(peer_students.PeerTrainer, loss=loss), "exact"
        else:
            trainer_class, like = partial(MeasuredTrainer, curve=curve), method
        given = like, student, teacher, self.data, self.windows, args, curve
        trainer = item_task.student_trainer(*given, trainer_class=trainer_class)
        trainer.add_callback(memory)
        trainer.train()
        logged = [log for log in trainer.state.log_history if SHARES[0] in log]
        return {
            "items": len(self.data.names),
            "test_users": len(self.test),
            "learning_rate": args.learning_rate,
            "steps": steps,
            "logits": PEER_ITEMS if method == "negatives" else item_task.logits_per_item(trainer),
            "seconds": curve.seconds,
            "cpu_seconds": curve.cpu_seconds,
            **{f"writing_{name}": spent for name, spent in writing.items()},
            "peak_mb": memory.megabytes,
            **item_task.scores(trainer.accelerator.unwrap_model(trainer.model), self.test),
            "curve": curve.curve,
            "in_sample": [{name: log[name] for name in ("step", *SHARES)} for log in logged],
        }


def steps_in_time(records: list[dict], key: dict[str, Any], clock: str) -> int:
    """The number of steps of a method in the time that another one took.

    Args:
        records: of the file.
        key: of the run; its method is one of ``IN_TIME``.
        clock: ``"seconds"`` or ``"cpu_seconds"``.

    Raises:
        ValueError: if a student that the number comes from is missing.
    """
    where = f"rate {key['rate']:g} and seed {key['seed']}"
    return students.steps_in_time(records, key, item_task.IN_TIME[key["method"]], clock, where)


def print_table(records: list[dict]) -> None:
    """Means over seeds; the ratio to exact KD's NDCG is over the seeds that both have."""
    names = ("data", "rate", "method", "seeds", "steps", "logits", "s per step", "seconds", "peak MB", "NDCG@10")
    print(header(*names, "recall@10", "NDCG / exact", "top 10 in sample", "in tail"))
    cells = students.by_setting(records, KEY[:-1])
    for key, runs in sorted(cells.items()):
        exact, some = cells.get((*key[:-1], "exact"), {}), list(runs.values())
        both = sorted(set(runs) & set(exact))
        ratio = (
            f"{mean(runs[s]['ndcg10'] for s in both) / mean(exact[s]['ndcg10'] for s in both):.3f}" if both else None
        )
        clock, steps = clock_of(some[0]["device"]), mean(one["steps"] for one in some)
        seconds, per_step = mean(one[clock] for one in some), students.seconds_per_step(some, clock)
        peak = students.peak_cell(some)
        time = f"{steps:.0f}", f"{some[0]['logits']:,}", f"{per_step:.3f}", f"{seconds:.0f}", peak
        quality = (f"{mean(one[name] for one in some):.4f}" for name in ("ndcg10", "recall10"))
        shares = (_first_to_last(some, name) for name in SHARES)
        print(row(key[0], f"x{key[4]:g}", key[5], len(runs), time[0], *time[1:], *quality, ratio, *shares))


def _first_to_last(records: list[dict], name: str) -> str | None:
    """A share at the first and at the last log, means over students."""
    if not records[0]["in_sample"]:
        return None
    first, last = (mean(one["in_sample"][at][name] for one in records) for at in (0, -1))
    return f"{first:.0%} to {last:.0%}"


def arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    source = made.add_mutually_exclusive_group()
    source.add_argument("--interactions", help="a file with a user and an item per line, in time order")
    source.add_argument("--simulate", type=int, metavar="N_ITEMS", help="simulate users of so many items")
    made.add_argument("--users", type=int, default=100_000, help="of --simulate")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--rates", nargs="+", type=float, default=[4.0], help="of the item embeddings")
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--steps", type=int, default=360)
    made.add_argument("--batch_users", type=int, default=96)
    made.add_argument("--max_length", type=int, default=50, help="items of a training window and of a history")
    made.add_argument("--width", type=int, default=64, help="features of the student")
    made.add_argument("--teacher_width", type=int, default=128)
    made.add_argument("--teacher_steps", type=int, default=2000)
    made.add_argument("--evaluations", type=int, default=10, help="points of a curve")
    made.add_argument("--eval_users", type=int, default=4000, help="of the validation")
    made.add_argument("--test_users", type=int, help="of the test; all of them if not given")
    made.add_argument("--folder", type=Path, default=Path("runs/items_benchmark"), help="of the teacher")
    made.add_argument("--plot", type=Path, help="an image of the curves of the file's first catalogue, rate and seed")
    given = parse(made)
    if given.json is None:
        made.error("--json is needed: the file of the records, which a later call continues")
    if not (given.interactions or given.simulate or given.json.exists()):
        made.error(f"{given.json} has no records to print: give --interactions or --simulate to train students")
    return given


def wanted_students(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The keys of all students that a command line asks for; none without a source of the data."""
    if not (given.interactions or given.simulate):
        return []
    data = Path(given.interactions).name if given.interactions else f"simulated {given.simulate:,}"
    return [
        dict(zip(KEY, (data, given.width, given.batch_users, given.steps, rate, method, seed), strict=True))
        for seed in given.seeds
        for rate in given.rates
        for method in (one for one in METHODS if one in given.methods)
    ]


def main() -> None:
    given = arguments()
    logging.set_verbosity_error()
    print(machine(given.device), flush=True)
    done = [{name: one[name] for name in KEY} for one in read(given.json)]
    wanted = [key for key in wanted_students(given) if key not in done]
    catalogue = Catalogue(given) if wanted else None
    for key in wanted:
        steps = given.steps
        if key["method"] in item_task.IN_TIME:
            steps = steps_in_time(read(given.json), key, clock_of(given.device.type))
        record = catalogue.trained(key["method"], key["rate"], key["seed"], steps)
        append(given.json, {**key, "command": command(), **record}, given.device)
    records = read(given.json)
    print_table(records)
    if given.plot:
        alike = students.of_first(records, KEY)
        clock = clock_of(records[0]["device"])
        qualities = {"ndcg10": "NDCG@10 in validation"}
        clm_plots.plot_curves(given.plot, alike, qualities, is_logarithmic=False, clock=clock)


if __name__ == "__main__":
    main()
