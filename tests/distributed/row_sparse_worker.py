"""What test_row_sparse_ddp runs in one process and, started by torchrun, in two: a training and a reduction."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import vit
from worker import trainer

from hf_dis.distributed.processes import of_first_process
from hf_dis.distributed.sums import average_rows, sum_over_processes

SETTINGS = {
    "row_sparse_head": True,
    "exact_warmup_steps": 1,  # all rows of the first step, sampled ones after it
    "proposal": "topk",
    "num_shared_classes": 0,
    "optim": "adamw_torch",
    "learning_rate": 0.02,
    "adam_epsilon": 1e-3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
}
CLASSES, WIDTH = 9, 3
# Rows of each process; the second has fewer, or none.
TOUCHED = {"some": [[1, 4, 8], [4]], "none": [[0, 2], []], "no gradient": [[0, 2], None]}
TOUCHED["dense"] = [list(range(CLASSES)), list(range(CLASSES))]


def gradient(ids: list[int], rank: int) -> torch.Tensor:
    rows = torch.arange(1.0, len(ids) * WIDTH + 1).view(len(ids), WIDTH) * (rank + 1)
    return torch.sparse_coo_tensor(torch.tensor(ids, dtype=torch.long)[None], rows, (CLASSES, WIDTH))


def run(output_dir: Path) -> None:
    """Trains, and averages some gradients; every process writes what it saw to ``output_dir``."""
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
    if processes == 2:
        for name, touched in TOUCHED.items():
            parameter = torch.nn.Parameter(torch.zeros(CLASSES, WIDTH))
            if touched[rank] is not None:
                parameter.grad = gradient(touched[rank], rank)
            if name == "dense":  # as all classes give it
                parameter.grad = parameter.grad.to_dense()
            average_rows([parameter])
            results[name] = parameter.grad
        statistics = {"rows": gradient(TOUCHED["some"][rank], rank), "dense": torch.full((3,), rank + 1.0)}
        results["first"] = of_first_process(lambda: f"from {rank}")
        results["sums"] = sum_over_processes(statistics)
    torch.save(results, output_dir / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
