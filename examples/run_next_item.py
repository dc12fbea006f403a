"""Distils a model that recommends the next item, with DISDistillationTrainer: a causal model whose tokens are items.

    accelerate launch examples/run_next_item.py --output_dir runs/items

Without a file the script makes everything offline: users of a catalogue of 20,000 items, simulated by a hidden Markov
model, and a Llama as teacher. The teacher is trained on labels by sampled softmax with the logQ correction. Students,
which are smaller, start from the same weights and see the same batches. The methods:

labels          labels only, the teacher's loss: 4,096 negatives that a batch shares, logQ correction
exact           exact KD
dis             DIS
dis_cached      DIS from a cache of the teacher's targets; its time includes the writing of the cache
topk            KD on the teacher's 64 best-ranked items

Methods for as long as DIS took, or DIS from a cache: exact_in_time, labels_in_time and labels_in_cached_time.

Writes results.json, report.md and a plot of NDCG@10 and recall@10 over all items.

    accelerate launch examples/run_next_item.py --output_dir runs/shop --interactions beauty.txt --max_steps 360

takes a file of your own, with a user and an item per line, each user's lines in time order. The script takes all flags
of DISConfig and TrainingArguments. More in docs/items.md.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

import clm_plots
import item_cache
import item_data
import item_task
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import HfArgumentParser, LlamaForCausalLM, set_seed

from hf_dis import DISConfig

METHODS = (*item_task.METHODS, *item_task.IN_TIME)
DEFAULTS = {
    "max_steps": 150,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-3,
    "head_learning_rate": 8e-3,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "train_sampling_strategy": "group_by_length",
    "temperature": 1.0,
    "hard_label_weight": 0.1,
    "head_mode": "sampled",
    "row_sparse_head": True,
    "eval_steps": 25,
    "logging_steps": 25,
    "save_strategy": "no",
}
# Of the teacher's training.
TEACHER = {"learning_rate": 2e-3, "head_learning_rate": 8e-3, "per_device_train_batch_size": 128, "weight_decay": 0.0}
QUALITIES = {"ndcg10": "NDCG@10", "recall10": "recall@10"}


@dataclass
class ItemArguments:
    """The catalogue, the sizes of the models, and the methods to compare."""

    interactions: str | None = field(
        default=None, metadata={"help": "A file with a user and an item per line; simulated if not given."}
    )
    num_items: int = field(default=20_000, metadata={"help": "Items of the simulated catalogue."})
    num_users: int = field(default=12_000, metadata={"help": "Users of the simulated catalogue."})
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A teacher that the script saved, of the same catalogue; trained if not given."},
    )
    max_length: int = field(default=50, metadata={"help": "Items of a training window and of a history, at most."})
    width: int = field(default=64, metadata={"help": "Features of the student."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the student."})
    teacher_width: int = field(default=128, metadata={"help": "Features of the teacher."})
    teacher_layers: int = field(default=2, metadata={"help": "Layers of the teacher."})
    teacher_steps: int = field(default=300, metadata={"help": "Steps of the teacher's training."})
    max_eval_users: int = field(default=1000, metadata={"help": "Users of the validation, at most; the test has all."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Methods to run, of {', '.join(METHODS)}."}
    )


def load_teacher(arguments: ItemArguments, args: DISConfig, data: item_data.Interactions) -> LlamaForCausalLM:
    """The teacher by its name, or trained on labels.

    Raises:
        ValueError: if the teacher has a different number of items.
    """
    name = arguments.teacher_model_name_or_path
    if name is None:
        print(f"Training the teacher for {arguments.teacher_steps} steps ...", flush=True)
        teacher = item_task.build(data.num_classes, arguments.teacher_width, arguments.teacher_layers, seed=0)
        settings = {**TEACHER, "max_steps": arguments.teacher_steps}
        return item_task.train_teacher(teacher, data, arguments.max_length, args, **settings)
    teacher = LlamaForCausalLM.from_pretrained(name)
    if teacher.config.vocab_size != data.num_classes:
        raise ValueError(
            f"the teacher {name} is of {teacher.config.vocab_size - 1:,} items, and the catalogue has "
            f"{len(data.names):,}: give a teacher that was trained on these interactions"
        )
    return teacher


def distil(
    method: str,
    steps: int,
    teacher: LlamaForCausalLM,
    data: item_data.Interactions,
    splits: dict[str, Dataset],
    arguments: ItemArguments,
    args: DISConfig,
) -> dict:
    """Trains and scores one student; returns the record for results.json."""
    args, folder = copy.copy(args), Path(args.output_dir)
    args.max_steps, args.output_dir = steps, str(folder / method)
    set_seed(args.seed)
    student = item_task.build(data.num_classes, arguments.width, arguments.num_layers, seed=1)
    curve = item_task.RankingCurve(splits["validation"], int(args.eval_steps))
    if method == "dis_cached":
        stored = item_cache.stored_targets(teacher, splits["train"], args.temperature, folder / "_cache")
        teacher = stored.cache
        curve.add(stored.seconds, stored.cpu_seconds)
    trainer = item_task.student_trainer(method, student, teacher, data, splits["train"], args, curve)
    trainer.train()
    trainer.save_model()
    return {
        "method": method,
        "items": len(data.names),
        "sampled": item_task.logits_per_item(trainer),
        "learning_rate": args.learning_rate,
        "head_learning_rate": args.head_learning_rate or args.learning_rate,
        "steps": trainer.state.global_step,
        "seconds": curve.seconds,
        **item_task.scores(trainer.accelerator.unwrap_model(trainer.model), splits["test"]),
        "curve": curve.curve,
    }


def report(records: list[dict], facts: list[str], references: dict[str, dict], minutes: float) -> list[str]:
    """The lines of report.md."""
    lines = [
        f"# Distilling the next item of {records[0]['items']:,}",
        "",
        *facts,
        "",
        f"{torch.get_num_threads()} threads; the whole run took {minutes:.1f} minutes. NDCG and recall are those of "
        "each user's last item over all items. Seconds are the training time, the teacher's forward included.",
        "",
        "| method | student logits per item | rate, embeddings' | steps | seconds | NDCG@10 | recall@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, scores in references.items():
        lines.append(f"| {name} | | | | | {scores['ndcg10']:.4f} | {scores['recall10']:.4f} |")
    for record in records:
        rates = f"{record['learning_rate']:g}, {record['head_learning_rate']:g}"
        lines.append(
            f"| {clm_plots.TITLES[record['method']]} | {record['sampled']:,} | {rates} | {record['steps']} "
            f"| {record['seconds']:.0f} | {record['ndcg10']:.4f} | {record['recall10']:.4f} |"
        )
    return lines


def main() -> None:
    parser = HfArgumentParser((ItemArguments, DISConfig))
    parser.set_defaults(**DEFAULTS)
    arguments, args = parser.parse_args_into_dataclasses()
    unknown = set(arguments.methods) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods {sorted(unknown)}: choose from {', '.join(METHODS)}")
    for method, (base, timed) in item_task.IN_TIME.items():
        if method in arguments.methods and not {timed, base} <= set(arguments.methods):
            parser.error(f"{method} needs the time of {timed} and the speed of {base}: name these in --methods too")

    started, output = time.perf_counter(), Path(args.output_dir)
    try:
        if arguments.interactions:
            data = item_data.read_interactions(arguments.interactions)
        else:
            data = item_data.simulate(arguments.num_items, arguments.num_users)
        splits = {"train": data.training(arguments.max_length), "test": data.held_out("test", arguments.max_length)}
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    source = arguments.interactions or "Users simulated by a hidden Markov model, no real shop"
    facts = [f"{source}.", *data.facts()]
    print(*facts, sep="\n", flush=True)
    users = data.held_out("validation", arguments.max_length).shuffle(seed=0)
    splits["validation"] = users.take(min(arguments.max_eval_users, len(users)))
    teacher = load_teacher(arguments, args, data)
    references = {
        "most frequent items": item_task.popularity_scores(data.counts(), splits["test"]),
        "teacher": item_task.scores(teacher.to(args.device), splits["test"]),
    }

    records: dict[str, dict] = {}
    for method in (method for method in METHODS if method in arguments.methods):
        steps = args.max_steps
        if method in item_task.IN_TIME:
            base, timed = (records[name] for name in item_task.IN_TIME[method])
            steps = max(1, round(base["steps"] * timed["seconds"] / base["seconds"]))
        print(f"Training a student by {method!r} ...", flush=True)
        records[method] = distil(method, steps, teacher, data, splits, arguments, args)
    if args.process_index == 0:
        found = list(records.values())
        minutes = (time.perf_counter() - started) / 60
        clm_plots.write_lines(output, found, report(found, facts, references, minutes))
        clm_plots.plot_curves(output / "curves.svg", found, QUALITIES, is_logarithmic=False)
        (output / "items.txt").write_text("".join(f"{name}\n" for name in data.names))


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
