"""Runs of test_equality in one process and, forked by launch.py, in two: the same items, split differently."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import bert_mlm, bert_tokens, labelled_images, labelled_tokens, llama, vit
from transformers import TrainerCallback

from hf_dis import ClassSampler, DISConfig, DISDistillationTrainer
from hf_dis.head.spread_rows import is_row_sparse, local, spread_as
from hf_dis.models.tasks import find_items

WINDOW, EXAMPLES, STEPS = 16, 44, 5  # examples of an optimizer step; an epoch is 16, 16 and 12; its end is crossed
CLASSES, LENGTH = 40, 6
ACCUMULATION = (1, 4)

TASKS = {"image": vit, "causal LM": llama, "masked LM": bert_mlm, "token classification": bert_tokens}
# Most proposals do not learn between the micro-batches of a window; "dis" does, and is compared without micro-batches.
# One tail: which items share one of several tails depends on the order of the items, and so on the split.
LAYOUTS = {
    "exact": {"head_mode": "exact"},
    "per item": {"proposal": "teacher", "num_shared_classes": 0},
    "strata": {"proposal": "uniform", "num_shared_classes": 8},
    "dis": {"proposal": "dis", "num_shared_classes": 8},
}
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}}
ROW_SPARSE = {"row_sparse_head": True, "optim": "adamw_torch", "learning_rate": 0.02, "adam_epsilon": 1e-3}


def data(task: str) -> list[dict]:
    """Examples with different numbers of supervised tokens.

    The second half of the first window has none: one of two processes, or some micro-batches, have no item there.
    """
    if task == "image":
        return labelled_images(EXAMPLES, CLASSES)
    items = labelled_tokens(EXAMPLES, CLASSES, LENGTH)
    generator = torch.Generator().manual_seed(5)
    for number, item in enumerate(items):
        share = 0 if WINDOW // 2 <= number < WINDOW else (number % 5 + 1) / 5
        item["labels"] = item["labels"].masked_fill(torch.rand(LENGTH, generator=generator) >= share, -100)
    return items


class SamplesByLabel(ClassSampler):
    """Samples that depend on the item alone, so that they are the same however items are split."""

    def sample(self, teacher, labels=None):
        self.generator.manual_seed(3)  # of the tail, the same in every micro-batch
        with mock.patch("hf_dis.sampling.designs.systematic_points", self._points):
            return super().sample(teacher, labels)

    def _sample(self, teacher, tails, labels):
        self.labels = labels
        return super()._sample(teacher, tails, labels)

    def _points(self, num_items, num_sampled, generator, device):
        return (self.labels.double() * 0.618)[:, None] % 1 + torch.arange(num_sampled, dtype=torch.float64)


class StandsForTwo(DISDistillationTrainer):
    """One process in place of two that each count their own items: its micro-batches are those of the two in turn."""

    def _get_num_items_in_batch(self, batch_samples, device):
        counts = [len(find_items(self.distiller.task, batch, batch.get("labels"))) for batch in batch_samples]
        self.own_items = iter([sum(counts[number % 2 :: 2]) for number in range(len(counts))])
        return super()._get_num_items_in_batch(batch_samples, device)

    def _normalise(self, loss, num_items_in_batch):
        return loss.sum() / max(1, next(self.own_items)) / 2


def dense(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient of a parameter, spread over processes or not."""
    if is_row_sparse(parameter.grad):
        return spread_as(parameter, local(parameter.grad).to_dense())
    return parameter.grad.clone()


class Keeps(TrainerCallback):
    """Keeps the gradient of each step, and the proposal after the step."""

    def __init__(self):
        self.gradients, self.proposals = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {name: dense(p) if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
        )

    def on_step_end(self, args, state, control, **kwargs):
        proposal = self.trainer.distiller.sampler.proposal.state_dict()
        self.proposals.append({name: value.clone() for name, value in proposal.items()})


def train(
    output_dir: Path, task: str, accumulation: int, items: list[dict], samples_by_label: bool = True, **keywords
):
    """Trains for some steps; returns gradients, proposals, classes sampled and the student."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    # Alone, each process's own items are two times as many micro-batches.
    stands_for_two = processes == 1 and not keywords.get("average_tokens_across_devices", True)
    accumulation *= 2 if stands_for_two else 1
    defaults = {
        "per_device_train_batch_size": WINDOW // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "accelerator_config": {"even_batches": False},  # or the last batches would be filled up with other examples
        "train_sampling_strategy": "sequential",
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "head_mode": "sampled",
        "num_sampled_classes": 6,
        "num_tails": 1,
        "rank_depth": 10,
        "hard_label_weight": 0.3,
    }
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "output_dir": str(output_dir)}
    build, keeps = TASKS[task], Keeps()
    trainer = (StandsForTwo if stands_for_two else DISDistillationTrainer)(
        build(CLASSES),
        build(CLASSES, seed=1, spread=30),
        DISConfig(**{**quiet, **defaults, **keywords}),
        train_dataset=items,
        callbacks=[keeps],
    )
    assert trainer.accelerator.num_processes == processes
    keeps.trainer, sampled = trainer, []
    if samples_by_label:
        trainer.distiller.sampler.__class__ = SamplesByLabel
    sample = trainer.distiller.sampler.sample

    def recorded(*args):
        sampled.append(sample(*args))
        return sampled[-1]

    trainer.distiller.sampler.sample = recorded
    trainer.train()
    return {
        "student": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "gradients": keeps.gradients,
        "proposals": keeps.proposals,
        "ids": [(one.item_ids, one.tail_ids) for one in sampled],
        "generator": trainer.distiller.sampler.generator.get_state(),
    }


def cases():
    """Name and settings of every run, without its split."""
    for task, layout, precision in product(TASKS, LAYOUTS, PRECISIONS):
        if precision == "fp32" or layout in ("exact", "per item"):
            yield (task, layout, precision), {**LAYOUTS[layout], **PRECISIONS[precision]}
    for task in ("image", "causal LM", "token classification"):
        yield (task, "per item", "row-sparse"), {**LAYOUTS["per item"], **ROW_SPARSE}


def apart_cases():
    """Cases where each process divides by its own items, and the gradient is the mean over processes."""
    for (task, layout, precision), keywords in cases():
        if layout in ("exact", "per item") and (precision == "fp32" or task == "causal LM"):
            yield (task, layout, f"{precision}, apart"), {**keywords, "average_tokens_across_devices": False}


def run(output_dir: Path) -> None:
    results = {"world_size": int(os.environ.get("WORLD_SIZE", 1))}
    for (name, keywords), accumulation in product([*cases(), *apart_cases()], ACCUMULATION):
        if name[1] != "dis" or accumulation == 1:
            results[(*name, accumulation)] = train(output_dir, name[0], accumulation, data(name[0]), **keywords)
    # The samples that a user gets.
    results["own samples"] = train(output_dir, "causal LM", 4, data("causal LM"), False, **LAYOUTS["dis"])
    torch.save(results, output_dir / f"rank_{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
