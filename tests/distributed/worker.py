"""Runs of test_ddp in one process and, forked by launch.py, in two: trainings whose results it compares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import labelled_images, vit

from hf_dis import DISConfig, DISDistillationTrainer

WINDOW = 8  # items of an optimizer step, over all processes and accumulation steps
RUNS = {
    "exact": {"head_mode": "exact"},
    "fixed sample": {"proposal": "topk", "num_shared_classes": 0},
    "dis": {},
}


def trainer(output_dir: Path, seed: int = 0, num_classes: int = 40, **keywords) -> DISDistillationTrainer:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    defaults = {
        "per_device_train_batch_size": WINDOW // 2,
        "gradient_accumulation_steps": 2 // processes,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 2,
        "save_strategy": "no",
        "head_mode": "sampled",
        "num_sampled_classes": 6,
        "num_shared_classes": 8,
        "rank_depth": 10,
    }
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return DISDistillationTrainer(
        vit(num_classes, seed),
        vit(num_classes, seed=1, spread=30),
        DISConfig(**{"output_dir": str(output_dir), **quiet, **defaults, **keywords}),
        train_dataset=labelled_images(2 * WINDOW, 40),
        eval_dataset=labelled_images(13, 40, seed=3),  # not a multiple of anything
    )


def clone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def run(output_dir: Path) -> None:
    """Trains each of RUNS, evaluates, and resumes; every process writes its results to ``output_dir``."""
    results = {"world_size": int(os.environ.get("WORLD_SIZE", 1))}
    for name, keywords in RUNS.items():
        this = trainer(output_dir / name, **keywords)
        assert this.accelerator.num_processes == results["world_size"]
        sampled, sample = [], this.distiller.sampler.sample

        def record(*args, sample=sample, sampled=sampled):
            sampled.append(sample(*args))
            return sampled[-1]

        this.distiller.sampler.sample = record
        this.train()
        results[name] = {
            "student": clone(this.model.state_dict()),
            "proposal": clone(this.distiller.sampler.proposal.state_dict()),
            "ids": [one.item_ids for one in sampled],
            "logs": [log for log in this.state.log_history if "loss" in log],
            "metrics": this.evaluate(),
            "features": this.extract_features(this.eval_dataset),
            "patched": [name for name, module in this.model.named_modules() if "forward" in vars(module)],
        }

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(output_dir / "resume", **saving)
    whole.train()
    resumed = trainer(output_dir / "resume", seed=5, **saving)
    resumed.train(resume_from_checkpoint=str(output_dir / "resume" / "checkpoint-2"))
    results["resume"] = [
        clone({**one.model.state_dict(), **one.distiller.sampler.state_dict()}) for one in (whole, resumed)
    ]
    rank = this.args.process_index
    results["saved"] = load_file(output_dir / "resume" / "checkpoint-4" / f"dis_state_{rank}.safetensors")
    torch.save(results, output_dir / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
