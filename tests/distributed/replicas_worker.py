"""Runs of test_replicas in one process and, forked by launch.py, in four: copies of tensor-parallel models."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import tensor_parallel_worker as models
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from equality_worker import data
from torch import Tensor
from torch.distributed import device_mesh

from hf_dis import DISArguments, build_distiller, cache_teacher_targets

# Two copies of a model, each spread over two processes; FSDP spreads the parts of a copy once more.
LAYOUTS = {"copied": {"dp_replicate_size": 2}, "FSDP": {"fsdp_size": 2}}
EXAMPLES, WINDOW = 32, 16  # of an optimizer step
EVEN = 44  # tokens of tied models under FSDP, whose rows have to be a multiple of the processes
PER_ITEM = {"gradient_accumulation_steps": 2, "num_shared_classes": 0, "proposal": "teacher"}
MODES = {
    "per item": PER_ITEM,
    "apart": PER_ITEM
    | {"gradient_accumulation_steps": 1, "average_tokens_across_devices": False, "max_grad_norm": 0.0},
    "sampled": {"proposal": "uniform"},
    "warm-up": {"proposal": "dis", "exact_warmup_steps": models.STEPS},
    "exact": {},
}
# A cache samples no class for each item alone: all of its stored sample is used.
STORED = {"depth": 8, "sample_size": 6, "show_progress": False}
CASES = {
    "copied": [
        (True, "whole", "forward_kl", "per item"),
        (False, "spread", "reverse_kl", "sampled"),
        (True, "cached", "forward_kl", "sampled"),
        (False, "cached", "forward_kl", "exact"),
    ],
    "FSDP": [
        (False, "spread", "forward_kl", "per item"),
        (True, "whole", "reverse_kl", "sampled"),
        (False, "whole", "forward_kl", "warm-up"),
        (True, "spread", "reverse_kl", "exact"),
    ],
}
FLOAT32 = {name: [case for case in cases if case[3] in ("per item", "exact")] for name, cases in CASES.items()}


def share_groups() -> None:
    """Lets all models and trainers of a shape share their groups, whose many threads would slow the run down."""
    own = cache(device_mesh.init_device_mesh)

    def shared(device_type, mesh_shape, mesh_dim_names):
        return own(device_type, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))

    dist.init_device_mesh = device_mesh.init_device_mesh = shared


def settings(case: tuple[bool, str, str, str]) -> dict:
    mode = {"gradient_accumulation_steps": 1, **MODES[case[3]]}
    copies = 2 if models.processes() > 1 else 1
    size = WINDOW // mode["gradient_accumulation_steps"] // copies
    return {"per_device_train_batch_size": size, "train_sampling_strategy": "sequential", "num_tails": 1, **mode}


def train(folders: dict[str, Path], folder: Path, case: tuple, sizes: dict[str, int], **keywords) -> dict:
    mode = case[3] if case[3] in models.MODES else "per item"
    given = {"data": data("causal LM")[:EXAMPLES], "one_sample": True, "sizes": sizes}
    return models.train(folders, folder, (*case[:3], mode), **given, **settings(case), **keywords)


def own_loop(folders: dict[str, Path], sizes: dict[str, int]) -> dict[str, Tensor]:
    """The gradient of the mean loss over the batches of two copies, in a loop without a Trainer."""
    batches = [models.batch(seed) for seed in (0, 1)]
    student, teacher = (models.load(folders[name], **sizes) for name in ("tied", "teacher"))
    arguments = DISArguments(**models.MODES["sampled"], num_tails=1, proposal="uniform")
    distiller = build_distiller(student.train(), teacher, arguments)
    models.split_alike(distiller.sampler)
    mine = batches if distiller.replicas is None else [batches[distiller.replicas.index]]
    for batch in mine:
        with distiller.step(batch) as step:
            step.loss(student(**step.inputs))[0].mean().div(len(mine)).backward()
    return models.gradients(student)


def run(folder: Path) -> None:
    # accelerate runs tensor parallelism on accelerators alone, and needs nothing of them.
    ParallelismConfig._validate_accelerator = lambda *_: None
    PartialState(cpu=True)
    share_groups()
    results = {"world_size": models.processes()}
    uneven, even = models.saved(folder), models.saved(folder / "even", EVEN)
    for name, sizes in LAYOUTS.items():
        sizes, own = {"tp_size": 2, **sizes} if models.processes() > 1 else {}, folder / name
        tied = even if name == "FSDP" else uneven
        if name == "copied":
            teacher = models.load(uneven["teacher"], **sizes)
            cache_teacher_targets(teacher, data("causal LM")[:EXAMPLES], own / "cache", **STORED)
        for case in CASES[name]:
            results[(name, *case)] = train(tied if case[0] else uneven, own, case, sizes)
        for case in FLOAT32[name]:
            found = train(tied if case[0] else uneven, own, case, sizes, dtype=torch.float32)
            results[(name, *case, "float32")] = found
        results[name, "own loop"] = own_loop(tied, sizes)
    results["apart"] = train(even, own, (True, "whole", "forward_kl", "apart"), sizes)
    best = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    given = {"learning_rate": 0.5, "lr_scheduler_type": "constant", **best}
    results["best"] = train(even, folder / "best", CASES["FSDP"][1], sizes, **given)
    torch.save(results, folder / f"rank_{int(os.environ.get('RANK', 0))}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
