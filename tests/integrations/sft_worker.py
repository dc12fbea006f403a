"""Trainings of SFT that the tests of exactness run in one process and, forked by launch.py, in two.

Each run keeps its batches as SFT's collator made them, the loss of each, the gradient of each step, and the student.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

import chats

from hf_dis import SamplerSpec, make_sampler

STEPS, WINDOW = 2, 8  # optimizer steps, and examples in each
# How SFT prepares the data: form of the examples, and settings.
DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("messages", {}),
    "assistant only": ("messages", {"assistant_only_loss": True}),
    "packed": ("messages", {"packing": True}),
    "packed, assistant only": ("messages", {"packing": True, "assistant_only_loss": True}),
    "packed by cuts": ("messages", {"packing": True, "packing_strategy": "wrapped", "assistant_only_loss": True}),
    "padding-free": ("messages", {"padding_free": True, "max_length": None, "assistant_only_loss": True}),
    "completion only": ("prompt", {}),
    "text": ("text", {}),
}
V = chats.V
# All classes have part in the loss: as exact distillation, with all in the shared tails, and per item.
MODES = {
    "exact": {"num_sampled_classes": V},
    "shared tails": {"num_sampled_classes": 10, "num_shared_classes": V},
    "per item": {},  # the sampler is replaced, as build_distiller takes exact mode for K >= V
}
ACCUMULATION = (1, 4)


class Keeps(TrainerCallback):
    """The gradient of each step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


def run(folder: Path, data: str, mode: str, accumulation: int, **keywords: Any) -> dict[str, Any]:
    """Trains in float64 for some steps; returns batches and losses of this process, gradients and the student."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    form, settings = DATA[data]
    keeps = Keeps()
    trainer = chats.make_trainer(
        folder,
        chats.in_float64(chats.student()),
        chats.in_float64(chats.teacher()),
        train_dataset=chats.chats(60, form),
        callbacks=[keeps],
        max_steps=STEPS,
        per_device_train_batch_size=WINDOW // processes // accumulation,
        gradient_accumulation_steps=accumulation,
        **{**settings, **MODES[mode], **keywords},
    )
    distiller = trainer.distiller
    assert trainer.accelerator.num_processes == processes and distiller.mode == (
        "exact" if mode == "exact" else "sampled"
    )
    if mode == "per item":
        distiller.sampler = make_sampler(V, SamplerSpec(num_sampled_classes=V, num_shared_classes=0))
    batches, losses, compute_loss = [], [], trainer.compute_loss

    def recorded(model, inputs, **arguments):
        batches.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        losses.append(compute_loss(model, inputs, **arguments))
        return losses[-1]

    trainer.compute_loss = recorded
    trainer.train()
    return {
        "batches": batches,
        "losses": [float(loss.detach()) for loss in losses],
        "gradients": keeps.gradients,
        "student": {name: value.clone() for name, value in trainer.model.state_dict().items()},
    }


def evaluate(folder: Path, packing: bool) -> dict[str, Any]:
    """Trains for a step that changes nothing, and evaluates; returns the tokens seen and the metrics."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = chats.make_trainer(
        folder,
        train_dataset=chats.chats(8),
        eval_dataset=chats.chats(15, seed=3),
        max_steps=1,
        learning_rate=0.0,
        packing=packing,
        per_device_train_batch_size=8 // processes,
        per_device_eval_batch_size=1 if packing else 2,
    )
    assert len(trainer.eval_dataset) % 2  # so the last batches of two processes are filled up
    trainer.train()
    return {"num_tokens": trainer.state.log_history[0]["num_tokens"], **trainer.evaluate()}


def cases():
    """Data, mode and accumulation of every run on two processes."""
    yield from product(DATA, MODES, ACCUMULATION)


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    results = {case: run(output, *case) for case in cases()}
    results |= {packing: evaluate(output, packing) for packing in (False, True)}
    results["world_size"] = int(os.environ["WORLD_SIZE"])
    torch.save(results, output / f"rank_{os.environ['RANK']}.pt")
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
