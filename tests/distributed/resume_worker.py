"""Runs of test_resume_ddp in one process and, forked by launch.py, in two.

Each trains to the end, and once more from a checkpoint that another number of processes saved.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import load_file
from tiny_models import labelled_images, vit
from transformers import TrainerCallback

from hf_dis import DISConfig, DISDistillationTrainer

WINDOW, EXAMPLES, STEPS, SAVED = 8, 40, 8, 3  # five steps per epoch; the checkpoint is within the first epoch
RUNS = {
    "exact": {"head_mode": "exact"},
    "sampled": {"head_mode": "sampled", "num_sampled_classes": 6, "num_shared_classes": 8, "rank_depth": 10},
}


class Keeps(TrainerCallback):
    """Keeps the sampler at the start of training, after a checkpoint is loaded, and the items of each step."""

    def __init__(self):
        self.sampler, self.items = {}, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.sampler = {name: value.clone() for name, value in self.trainer.distiller.sampler.state_dict().items()}


class Told(logging.Handler):
    """Keeps warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def train(output_dir: Path, name: str, checkpoint: Path | None = None) -> dict:
    """Trains to the last step, from a checkpoint if one is given."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = DISConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=WINDOW // 2,
        gradient_accumulation_steps=2 // processes,
        max_steps=STEPS,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # or Adam makes steps of the rounding errors of gradients near zero
        save_strategy="steps",
        save_steps=SAVED,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **RUNS[name],
    )
    keeps, told = Keeps(), Told()
    trainer = DISDistillationTrainer(
        vit(40, seed=0 if checkpoint is None else 7),
        vit(40, seed=1, spread=30),
        args,
        train_dataset=labelled_images(EXAMPLES, 40),
        callbacks=[keeps],
    )
    assert trainer.accelerator.num_processes == processes
    keeps.trainer, compute_loss = trainer, trainer.compute_loss

    def recorded(model, inputs, **kwargs):
        items = keeps.items.setdefault(trainer.state.global_step, [])
        items += inputs["pixel_values"].sum((1, 2, 3)).tolist()
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = recorded
    logging.getLogger("hf_dis").addHandler(told)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    logging.getLogger("hf_dis").removeHandler(told)
    saved = output_dir / f"checkpoint-{SAVED}" / f"dis_state_{args.process_index}.safetensors"
    return {
        "saved": load_file(saved) if saved.exists() else None,
        "student": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "end": {name: value.clone() for name, value in trainer.distiller.sampler.state_dict().items()},
        "begin": keeps.sampler,
        "items": keeps.items,
        "told": told.messages,
        "step": trainer.state.global_step,
    }


def run(output_dir: Path, others: Path | None) -> None:
    """Trains each of RUNS, whole, and from the checkpoint of the same run by the other number of processes."""
    rank, results = int(os.environ.get("RANK", 0)), {"world_size": int(os.environ.get("WORLD_SIZE", 1))}
    for name in RUNS:
        results[name, "whole"] = train(output_dir / name, name)
        if others is not None:
            checkpoint = others / name / f"checkpoint-{SAVED}"
            results[name, "resumed"] = train(output_dir / f"{name}-resumed", name, checkpoint)
    torch.save(results, output_dir / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
