"""A run of test_budget_ddp, forked by launch.py in two processes: sizes that follow the error of the gradient."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from worker import trainer

from hf_dis.sampling import budget

SETTINGS = {
    **dict.fromkeys(("num_sampled_classes", "num_shared_classes", "num_tails", "rank_depth")),
    "gradient_error": 3.0,  # a small sample will do
    "learning_rate": 0.02,
    "max_steps": 6,
    "logging_steps": 1,
}
CLASSES = 600


def run(output_dir: Path) -> None:
    """Trains; every process writes its errors and its sizes, batch by batch, to ``output_dir``."""
    budget.BATCHES = 1
    rank = int(os.environ["RANK"])
    this = trainer(output_dir / "training", num_classes=CLASSES, **SETTINGS)
    sampler, sizes, own = this.distiller.sampler, [], []
    follow = sampler.follow

    def noted(error, reduce):
        own.append([float(part.sum()) for part in error])
        follow(error, reduce)
        sizes.append(tuple(sampler.budget.sizes))

    sampler.follow = noted
    this.train()
    state = sampler.state_dict()["budget"]
    results = {"world_size": int(os.environ["WORLD_SIZE"]), "errors": own, "sizes": sizes, "state": state}
    torch.save(results, output_dir / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
