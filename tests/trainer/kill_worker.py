"""Trains in a child process that is killed, again and again, and resumed each time: what test_resume runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from tiny_models import labelled_images, vit

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.trainer.manifest import what_is_torn

LONG = {"max_steps": 90, "save_steps": 1, "save_total_limit": 3}


def trainer(output_dir: Path, student: int = 0, **keywords) -> DISDistillationTrainer:
    """Dropout, momentum and a schedule: everything that has to continue where it was."""
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "head_mode": "sampled",
        "num_sampled_classes": 6,
        "num_shared_classes": 8,
        "rank_depth": 10,
    }
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return DISDistillationTrainer(
        vit(40, student, hidden_dropout_prob=0.1),
        vit(40, seed=1, spread=30),
        DISConfig(**{"output_dir": str(output_dir), **quiet, **defaults, **keywords}),
        train_dataset=labelled_images(24, 40),
    )


def train(output_dir: Path) -> None:
    """Resumes from what is whole, trains to the end, and writes down what came out."""
    folders = list(output_dir.glob("checkpoint-*"))
    torn = [folder.name for folder in folders if what_is_torn(folder)]
    print(f"torn: {torn}" if torn else "nothing torn", flush=True)
    this = trainer(output_dir, **LONG)
    this.train(resume_from_checkpoint=len(torn) < len(folders))
    sampler = {f"sampler.{name}": value for name, value in this.distiller.sampler.state_dict().items()}
    save_file({**this.model.state_dict(), **sampler}, output_dir / "end.safetensors")


def run(output_dir: Path, delays: list[float]) -> None:
    """Kills the training every third step, each time after a delay in seconds, and lets it end at last."""
    output_dir.mkdir()
    fork = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    for number, delay in enumerate(delays, start=1):
        child = fork.Process(target=train, args=(output_dir,))
        child.start()
        while child.is_alive() and not (output_dir / f"checkpoint-{3 * number}").exists():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL, f"it had ended by itself, with {child.exitcode}"
        print("killed", sorted(path.name for path in output_dir.iterdir()), flush=True)
    last = fork.Process(target=train, args=(output_dir,))
    last.start()
    last.join()
    assert last.exitcode == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), [float(delay) for delay in sys.argv[2:]])
