"""CIFAR-100, the data of arXiv 1812.00914: top-1 of students against K, the classes that a step samples per image.

    python benchmarks/paper_cifar.py --data_dir cifar-100-python.tar.gz --json cifar.jsonl --hours
    python benchmarks/paper_cifar.py --data_dir cifar-100-python.tar.gz --json cifar.jsonl
    python benchmarks/paper_cifar.py --json cifar.jsonl --plot cifar.svg  # prints and plots what the file has

Teacher and student are residual networks for small images (arXiv 1512.03385), of 20 and 8 layers: a pair of
arXiv 1902.03393 that two processor cores train. SGD with momentum, a cosine schedule, crops and flips; --epochs is far
below the 240 epochs that are usual. Both compute in bfloat16 by autocast. The teacher is trained on labels first. All
students see the same augmented images, which --folder keeps with the teacher's logits. Methods, all with a tenth of
hard labels:

labels         hard labels alone
exact          exact KD
dis            DIS, K classes per image with replacement, as in the paper
dis_pps        DIS, K distinct classes per image
dis_tail       DIS, K / 2 ranked classes per image, and K / 2 of a shared tail
ftis           K classes with replacement, in proportion to the teacher's probabilities by rank
uniform        K classes with replacement, uniform
topk           KD on the teacher's K likeliest classes

A rate is that of the head, as a multiple of the body's. A line is written for each student, and a run that is in the
file already is not run again. The first command prints how many runs are left and how long they take by the runs that
are there. --one_seed lists methods that get the first seed alone.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
from cifar_task import CifarResNet, CifarResNetConfig, Images, StoredTeacher, StoredViews, stored_views
from common import append, command, header, is_saved, machine, parse, parser, read, row
from datasets import Dataset
from students import by_setting
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.cache import SeededViews
from hf_dis.data import load_cifar100
from hf_dis.metrics import TopKAccuracy
from hf_dis.report.style import plotted, write_svg

matplotlib.use("Agg")

import matplotlib.pyplot as plt

KEY = ("teacher_depth", "depth", "epochs", "temperature", "rate", "method", "sampled", "seed")
PER_IMAGE = {"num_shared_classes": 0, "design": "replacement"}
# The settings of the methods that sample, for K classes; methods on all classes have no K.
SAMPLED: dict[str, dict[str, Any]] = {
    "dis": PER_IMAGE,
    "dis_pps": {"num_shared_classes": 0},
    "dis_tail": {},
    "ftis": {**PER_IMAGE, "proposal": "teacher"},
    "uniform": {**PER_IMAGE, "proposal": "uniform"},
    "topk": {"num_shared_classes": 0, "proposal": "topk"},
}
WHOLE: dict[str, dict[str, Any]] = {
    "labels": {"head_mode": "exact", "hard_label_weight": 1.0},
    "exact": {"head_mode": "exact"},
}
METHODS = [*WHOLE, *SAMPLED]
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 500,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "max_grad_norm": 5.0,
    "bf16": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
RATE = 0.1


def optimizer(model: torch.nn.Module, head_rate: float) -> torch.optim.SGD:
    """Makes SGD with Nesterov momentum.

    Args:
        model: with the head ``classifier``.
        head_rate: of the head, as a multiple of the body's.
    """
    head = list(model.classifier.parameters())
    body = [one for name, one in model.named_parameters() if not name.startswith("classifier.")]
    groups = [{"params": body}, {"params": head, "lr": head_rate * RATE}]
    return torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)


class Students:
    """The images, the teacher's logits and the settings of all students.

    Args:
        given: the command line.
    """

    def __init__(self, given: argparse.Namespace):
        self.given, self.use_cpu = given, given.device.type == "cpu"
        splits = load_cifar100(given.data_dir, verify_checksum=not given.no_verify_checksum)
        train, test = (self._some_of(splits[name]) for name in ("train", "test"))
        teacher = self._teacher(train).eval()
        self.test = self._stored("test", teacher, SeededViews(Images(test, is_augmented=False), 1))
        views = SeededViews(Images(train, is_augmented=True), given.epochs)
        self.train = self._stored(f"train_{given.epochs}", teacher, views)

    def _some_of(self, split: Dataset) -> Dataset:
        """The images of a split, or so many of them, always the same."""
        number = self.given.images
        return split if number is None else split.shuffle(seed=0).take(min(number, len(split)))

    def _stored(self, name: str, teacher: CifarResNet, views: SeededViews) -> StoredViews:
        return stored_views(teacher, views, self.given.folder / name)

    def _teacher(self, train: Dataset) -> CifarResNet:
        """The teacher of the folder, or a new one."""
        given, folder = self.given, self.given.folder / "teacher"
        if is_saved(folder):
            return CifarResNet.from_pretrained(folder).to(given.device)
        set_seed(0)
        model = CifarResNet(CifarResNetConfig(given.teacher_depth))
        views = SeededViews(Images(train, is_augmented=True), given.teacher_epochs, seed=1)
        args = TrainingArguments(str(folder), num_train_epochs=1, logging_steps=100, use_cpu=self.use_cpu, **SETTINGS)
        trainer = Trainer(model, args, train_dataset=views, optimizers=(optimizer(model, 1.0), None))
        trainer.train()
        trainer.save_model()
        return trainer.accelerator.unwrap_model(trainer.model)

    def trained(self, key: dict[str, Any]) -> dict[str, Any]:
        """Trains and evaluates a student.

        Args:
            key: its values of ``KEY``.
        """
        settings = {"hard_label_weight": 0.1, "head_mode": "sampled", **settings_of(key["method"], key["sampled"])}
        args = DISConfig(
            str(self.given.folder / "_runs"),
            num_train_epochs=1,
            temperature=key["temperature"],
            seed=key["seed"],
            use_cpu=self.use_cpu,
            remove_unused_columns=False,
            logging_steps=100,
            **SETTINGS,
            **settings,
        )
        set_seed(key["seed"])
        model = CifarResNet(CifarResNetConfig(key["depth"]))
        trainer = DISDistillationTrainer(
            model=model,
            teacher_model=StoredTeacher(),
            args=args,
            train_dataset=self.train,
            eval_dataset=self.test,
            optimizers=(optimizer(model, key["rate"]), None),
            compute_metrics=lambda found: TopKAccuracy().compute(
                predictions=found.predictions, references=found.label_ids
            ),
            preprocess_logits_for_metrics=lambda logits, labels: logits.topk(5).indices,
        )
        result = trainer.train()
        metrics = trainer.evaluate()
        found = {name: metrics[f"eval_{name}"] for name in ("top1", "top5", "kl")}
        return {**found, "steps": result.global_step, "seconds": result.metrics["train_runtime"]}


def settings_of(method: str, sampled: int | None) -> dict[str, Any]:
    """The settings of a method with K classes; None for a method on all classes."""
    if sampled is None:
        return WHOLE[method]
    if method == "dis_tail":
        half = sampled // 2
        return {"num_sampled_classes": half, "rank_depth": half, "num_shared_classes": sampled - half}
    return {"num_sampled_classes": sampled, **SAMPLED[method]}


def wanted_runs(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The keys of all students that a command line asks for; none without the images."""
    if not given.data_dir:
        return []
    fixed = given.teacher_depth, given.depth, given.epochs
    kinds = [(name, None) for name in WHOLE if name in given.methods]
    kinds += list(product((name for name in SAMPLED if name in given.methods), given.sampled))
    return [
        dict(zip(KEY, (*fixed, temperature, rate, method, sampled, seed), strict=True))
        for seed in given.seeds
        for temperature, rate, (method, sampled) in product(given.temperatures, given.rates, kinds)
        if seed == given.seeds[0] or method not in given.one_seed
    ]


def print_table(records: list[dict]) -> None:
    """Means over seeds, and the difference to exact KD at the same temperature and rate."""
    print(header("temperature", "head rate", "method", "K", "seeds", "top-1", "±", "top-1 - exact", "KL"))
    cells = by_setting(records, KEY[:-1])
    for key, runs in sorted(cells.items(), key=lambda item: (item[0][:-1], item[0][-1] or 0)):
        exact = cells.get((*key[:5], "exact", None), {})
        both = sorted(set(runs) & set(exact))
        top1, kl = ([one[name] for one in runs.values()] for name in ("top1", "kl"))
        against = 100 * mean(runs[seed]["top1"] - exact[seed]["top1"] for seed in both) if both else None
        print(
            row(
                *(f"{key[3]:g}", f"x{key[4]:g}", key[5], key[6], len(runs), f"{mean(top1):.1%}"),
                f"{100 * stdev(top1):.1f}" if len(top1) > 1 else None,
                None if against is None else f"{against:+.1f}",
                f"{mean(kl):.3f}",
            )
        )


def plot(records: list[dict], path: Path) -> None:
    """Plots the best top-1 over the head's rates against K, at the temperature of the first record."""
    alike = [one for one in records if one["temperature"] == records[0]["temperature"]]
    best: dict[tuple[str, int | None], float] = {}
    for (*_, method, sampled), runs in by_setting(alike, KEY[:-1]).items():
        top1 = 100 * mean(one["top1"] for one in runs.values())
        best[method, sampled] = max(top1, best.get((method, sampled), 0.0))
    with plotted():
        figure, axis = plt.subplots(figsize=(6, 4))
        for method in METHODS:
            points = sorted((sampled, top1) for (name, sampled), top1 in best.items() if name == method and sampled)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=method)
            elif (method, None) in best:
                style = "-" if method == "exact" else ":"
                axis.axhline(best[method, None], color="gray", linestyle=style, label=method)
        axis.set(xlabel="K, sampled classes per image", ylabel="top-1, %")
        axis.legend(fontsize="small")
    write_svg(figure, path)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--data_dir", help="CIFAR-100, as examples/run_cifar.py takes it")
    made.add_argument("--no_verify_checksum", action="store_true", help="as of examples/run_cifar.py")
    made.add_argument("--images", type=int, help="of each split; all of them if not given")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    made.add_argument("--one_seed", nargs="*", choices=METHODS, default=["labels", "uniform", "topk", "dis_pps"])
    made.add_argument("--sampled", nargs="+", type=int, default=[5, 10, 20], help="K")
    made.add_argument("--temperatures", nargs="+", type=float, default=[4.0])
    made.add_argument("--rates", nargs="+", type=float, default=[1.0], help="of the head")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--epochs", type=int, default=12, help="of a student")
    made.add_argument("--teacher_epochs", type=int, default=15)
    made.add_argument("--depth", type=int, default=8)
    made.add_argument("--teacher_depth", type=int, default=20)
    made.add_argument(
        "--folder", type=Path, default=Path("runs/paper_cifar"), help="of the teacher and the stored views"
    )
    made.add_argument("--hours", action="store_true", help="print the time of the runs that are left, and end")
    made.add_argument("--plot", type=Path, help="an image of top-1 against K")
    given = parse(made)
    if given.json is None:
        made.error("--json is needed: the file of the records, which a later call continues")
    if not given.data_dir and not given.json.exists():
        made.error(f"{given.json} has no records to print: give --data_dir to train students")
    if min(given.sampled) < 2:
        made.error(f"--sampled has {min(given.sampled)}: K has to be 2 or more, a ranked class and one of the tail")
    return given


def main() -> None:
    given = arguments()
    logging.set_verbosity_error()
    print(machine(given.device), flush=True)
    done = [{name: one[name] for name in KEY} for one in read(given.json)]
    wanted = [key for key in wanted_runs(given) if key not in done]
    if given.hours:
        seconds = [one["seconds"] for one in read(given.json)]
        time = f"{len(wanted) * mean(seconds) / 3600:.1f} hours" if seconds else "no run yet to tell the time from"
        print(f"{len(wanted)} runs are left: {time}")
        return
    task = Students(given) if wanted else None
    for key in wanted:
        append(given.json, {**key, "command": command(), **task.trained(key)}, given.device)
    records = read(given.json)
    print_table(records)
    if given.plot:
        plot(records, given.plot)


if __name__ == "__main__":
    main()
