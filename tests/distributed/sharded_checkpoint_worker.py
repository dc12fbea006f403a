"""Runs of test_sharded_checkpoints: a training of a sharded head that saves, and trainings that resume it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from equality_worker import SamplesByLabel
from sharded_head_worker import GRADIENTS, WINDOW, examples, settings, student, teacher, whole, whole_rows, whole_state

from hf_dis import DISConfig, DISDistillationTrainer

KINDS = {
    "row-sparse": GRADIENTS["row-sparse"],
    "dense": {"optim": "adamw_torch", "learning_rate": 0.02},
    "bfloat16": GRADIENTS["row-sparse"] | {"offload_moments": True, "moment_dtype": "bfloat16"},
}
STEPS, SAVED = 4, 2


def train(folder: Path, kind: str, checkpoint: str | None) -> dict:
    trainer = DISDistillationTrainer(
        student("image", True),
        teacher("image"),
        DISConfig(
            output_dir=str(folder / kind),
            **settings(max_steps=STEPS, num_tails=1, **KINDS[kind])
            | {"save_strategy": "steps" if checkpoint is None else "no", "save_steps": SAVED},
            hub_model_id="tester/sharded",
        ),
        train_dataset=examples("image"),
    )
    assert trainer.args.train_batch_size * trainer.args.world_size == WINDOW
    trainer.distiller.sampler.__class__ = SamplesByLabel
    if checkpoint is not None:  # the state must come from the files
        with torch.no_grad():
            trainer.model.classifier.weight.add_(1)
    trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint is None:
        trainer.save_model()
        if kind == "dense":
            trainer.push_to_hub()
    head = trainer.model.classifier
    states = {own: trainer.optimizer.state[parameter] for own, parameter in head.named_parameters()}
    moments = {
        f"{own}.{name}": whole_rows(head, value)
        for own, state in states.items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    proposal = whole_state(head, trainer.distiller.sampler.state_dict())
    del proposal["generator"]
    return whole(trainer.model, dict(trainer.model.state_dict())) | moments | proposal


def run(folder: Path, resumes: bool) -> None:
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    PartialState(cpu=True)
    results = {"world_size": processes}
    for kind in KINDS:
        checkpoint = str(folder / kind / f"checkpoint-{SAVED}") if resumes else None
        results[kind] = train(folder, kind, checkpoint)
    torch.save(results, folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), resumes=len(sys.argv) > 2)
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
