"""Runs of test_machines, started by torchrun: a sum over all processes, or a training in which a process is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

STEPS, SAVED, KILLED = 4, 2, 1


def joined(folder: Path) -> None:
    dist.init_process_group("gloo")
    total = torch.tensor([2.0 ** dist.get_rank()])
    dist.all_reduce(total)
    (folder / f"rank_{dist.get_rank()}").write_text(f"{os.environ['GROUP_RANK']} {int(total)}")
    dist.barrier()
    dist.destroy_process_group()


def killed(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from accelerate import PartialState
    from sharded_head_worker import examples, settings, student, teacher
    from transformers import TrainerCallback

    from hf_dis import DISConfig, DISDistillationTrainer

    class Kills(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == STEPS - 1 and dist.get_rank() == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)

    PartialState(cpu=True)
    given = settings(max_steps=STEPS) | {"save_strategy": "steps", "save_steps": SAVED, "ddp_timeout": 30}
    trainer = DISDistillationTrainer(
        student("image", True),
        teacher("image"),
        DISConfig(output_dir=str(folder), **given),
        train_dataset=examples("image"),
        callbacks=[Kills()],
    )
    trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"joined": joined, "killed": killed}[sys.argv[2]](Path(sys.argv[1]))
