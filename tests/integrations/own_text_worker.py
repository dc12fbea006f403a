"""Trainings that the tests of on-policy hosts run in one process and, forked by launch.py, in two.

Each run keeps the batches that the losses were computed on, the gradient of each step, and the student.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

import chats
import own_text
from sft_worker import Keeps

from hf_dis import SamplerSpec, make_sampler

STEPS, WINDOW = 2, 8  # optimizer steps, and prompts in each
V = chats.V
# All classes have part in the loss: as exact distillation, with all in the shared tails, and per item.
MODES = {
    "exact": {"head_mode": "exact"},
    "shared tails": own_text.ALL,
    "per item": {},  # the sampler is replaced, as build_distiller takes exact mode for K >= V
}
# TRL's runs, and those of the method that are compared with them.
TRL = {
    "reverse": {},
    "forward": {"beta": 0.0},
    "between": {"beta": 0.3},
    "warm": {"beta": 1.0, "temperature": 2.0},
}
CASES = [(name, mode, accumulation) for name in ("reverse", "between") for mode in MODES for accumulation in (1, 4)]
# Two processes average gradients over each other's tokens whatever this setting says.
APART = {"average_tokens_across_devices": False}


def _models():
    return chats.in_float64(chats.student()), chats.in_float64(chats.teacher())


def _sizes(accumulation: int) -> dict[str, int]:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    sizes = {"per_device_train_batch_size": WINDOW // processes // accumulation}
    return {**sizes, "gradient_accumulation_steps": accumulation, "max_steps": STEPS}


def _result(trainer, keeps: Keeps, batches: list, losses: list) -> dict[str, Any]:
    return {
        "batches": batches,
        "losses": [float(loss.detach()) for loss in losses],
        "gradients": keeps.gradients,
        "student": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "logs": trainer.state.log_history,
    }


def _trained(trainer, keeps: Keeps) -> dict[str, Any]:
    """Trains; keeps the batches as ``compute_loss`` is given them."""
    batches, losses, compute_loss = [], [], trainer.compute_loss

    def recorded(model, inputs, **arguments):
        batches.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        losses.append(compute_loss(model, inputs, **arguments))
        return losses[-1]

    trainer.compute_loss = recorded
    trainer.train()
    return _result(trainer, keeps, batches, losses)


def run_trl(folder: Path, name: str, accumulation: int) -> dict[str, Any]:
    """TRL's own trainer."""
    keeps = Keeps()
    return _trained(
        own_text.trl_trainer(folder, *_models(), callbacks=[keeps], **_sizes(accumulation), **TRL[name]), keeps
    )


def run(folder: Path, name: str, mode: str, accumulation: int, **keywords: Any) -> dict[str, Any]:
    """The trainer of the method, with the settings of TRL's run."""
    keeps, settings = Keeps(), {**TRL[name], **MODES[mode], **keywords}
    trainer = own_text.make_trainer(folder, *_models(), callbacks=[keeps], **_sizes(accumulation), **settings)
    _prepare(trainer, mode)
    return _trained(trainer, keeps)


def run_gkd(folder: Path, mode: str, accumulation: int, **keywords: Any) -> dict[str, Any]:
    """GKD with the step of the method."""
    keeps, settings = Keeps(), {**MODES[mode], **keywords}
    trainer = own_text.gkd_trainer(folder, *_models(), callbacks=[keeps], **_sizes(accumulation), **settings)
    _prepare(trainer, mode)
    return _trained(trainer, keeps) | {"items": int(trainer.num_items_seen)}


def _prepare(trainer, mode: str) -> None:
    assert trainer.distiller.mode == ("exact" if mode == "exact" else "sampled")
    assert trainer.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    if mode == "per item":
        trainer.distiller.sampler = make_sampler(V, SamplerSpec(num_sampled_classes=V, num_shared_classes=0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    results = {("trl", name, acc): run_trl(output, name, acc) for name in ("reverse", "between") for acc in (1, 4)}
    results |= {case: run(output, *case) for case in CASES}
    results["apart"] = run(output, "reverse", "shared tails", 4, **APART)
    results |= {("gkd", lmbda): run_gkd(output, "shared tails", 4, lmbda=lmbda) for lmbda in (0.0, 0.5, 1.0)}
    results["world_size"] = int(os.environ["WORLD_SIZE"])
    torch.save(results, output / f"rank_{os.environ['RANK']}.pt")
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
