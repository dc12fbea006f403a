"""A run of test_row_sparse_ddp in one process and, forked by launch.py, in two: a row-sparse head."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import vit
from worker import trainer

SETTINGS = {
    "row_sparse_head": True,
    "exact_warmup_steps": 1,  # all rows in the first step, sampled rows later
    "proposal": "topk",
    "num_shared_classes": 0,
    "optim": "adamw_torch",
    "learning_rate": 0.02,
    "adam_epsilon": 1e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
}


def run(output_dir: Path) -> None:
    """Trains; every process writes its results to ``output_dir``."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    this = trainer(output_dir / "training", **SETTINGS)
    if rank:  # the first process's head is everybody's, as the rest of the model is
        with torch.no_grad():
            this.model.classifier.weight.add_(1)
    this.train()
    results = {
        "world_size": processes,
        "student": {name: value.clone() for name, value in this.model.state_dict().items()},
        "untrained": vit(40).state_dict(),
        "norms": [log["grad_norm"] for log in this.state.log_history if "loss" in log],
        "loss": [log["loss"] for log in this.state.log_history if "loss" in log],
        "steps": this.optimizer.state[this.head.module.weight]["step"],
    }
    torch.save(results, output_dir / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
