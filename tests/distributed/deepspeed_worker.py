"""Runs of test_deepspeed: in one process and, started by torchrun under ZeRO-2 and ZeRO-3, in two."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from equality_worker import CLASSES, EXAMPLES, TASKS, WINDOW, SamplesByLabel, data

from hf_dis import DISConfig, DISDistillationTrainer

LAYOUTS = {"exact": {"head_mode": "exact"}, "per item": {"proposal": "teacher"}, "dis": {"num_shared_classes": 8}}
CASES = [*product(("image", "causal LM"), ("exact", "per item")), ("image", "dis")]
STAGES = (2, 3)


def zero(stage: int) -> dict:
    """A configuration that leaves the optimizer to Trainer, and shards every parameter, however small."""
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {
        **dict.fromkeys(automatic, "auto"),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def counted():
    """Makes accelerate count DeepSpeed's processes on a machine without an accelerator.

    There accelerate names no backend, and takes each process for the only one. DeepSpeed itself takes gloo.
    """
    prepare = PartialState._prepare_backend
    return mock.patch.object(
        PartialState,
        "_prepare_backend",
        lambda self, cpu=False, sagemaker_dp=False, backend=None: prepare(self, cpu, sagemaker_dp, backend or "gloo"),
    )


def trainer(
    output_dir: Path, task: str, layout: str, stage: int, teacher: str, seed: int = 0, **keywords
) -> DISDistillationTrainer:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = DISConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=WINDOW // processes // 2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        max_steps=4,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.5,
        report_to="none",
        disable_tqdm=True,
        **{"num_sampled_classes": 6, "num_shared_classes": 0, "rank_depth": 10, "head_mode": "sampled"}
        | LAYOUTS[layout],
        **({"deepspeed": zero(stage)} if stage else {"use_cpu": True}),
        **{"save_strategy": "no", **keywords},
    )
    items = data(task)[: EXAMPLES // WINDOW * WINDOW]
    student, others = TASKS[task](CLASSES, seed=seed), data(task)[len(items) :]
    return DISDistillationTrainer(student, teacher, args, train_dataset=items, eval_dataset=others)


def student(this: DISDistillationTrainer, stage: int) -> dict[str, torch.Tensor]:
    """The parameters in full."""
    parameters, gathered = dict(this.model.named_parameters()), nullcontext()
    if stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def train(output_dir: Path, task: str, layout: str, stage: int, teacher: str) -> dict:
    this = trainer(output_dir, task, layout, stage, teacher)
    assert this.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    if layout == "per item":
        this.distiller.sampler.__class__ = SamplesByLabel
    this.train()
    sharded = all(parameter.numel() == 0 for parameter in this.model.parameters())
    held = [parameter.numel() for parameter in this.distiller.teacher.model.parameters()]
    return {
        "student": student(this, stage),
        "sharded": sharded,
        "teacher": sum(held),
        "sampler": {name: value.clone() for name, value in this.distiller.sampler.state_dict().items()},
        "optimizer": type(this.optimizer).__name__,
        "metrics": this.evaluate(),
    }


def resume(output_dir: Path, stage: int, teacher: str) -> list[dict[str, torch.Tensor]]:
    """Student and sampler after a run, and after a run that resumes from a checkpoint of the first run."""
    ends = []
    for seed, checkpoint in ((0, None), (7, str(output_dir / "checkpoint-2"))):
        this = trainer(output_dir, "image", "dis", stage, teacher, seed, save_strategy="steps", save_steps=2)
        this.train(resume_from_checkpoint=checkpoint)
        ends.append({**student(this, stage), **this.distiller.sampler.state_dict()})
    return ends


def run(output_dir: Path, teachers: Path) -> None:
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    results = {"world_size": processes}
    with counted() if processes > 1 else nullcontext():
        for (task, layout), stage in product(CASES, STAGES if processes > 1 else (0,)):
            results[task, layout, stage] = train(output_dir, task, layout, stage, str(teachers / task))
        for stage in STAGES if processes > 1 else ():
            results["resume", stage] = resume(output_dir / f"stage-{stage}", stage, str(teachers / "image"))
    if processes > 1:
        try:
            trainer(output_dir, "image", "exact", 2, str(teachers / "image"))
        except ValueError as error:
            results["miscounted"] = str(error)
    torch.save(results, output_dir / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
