"""Runs of test_replicas in one process and, started by torchrun, in four: copies of tensor-parallel models."""

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

from hf_dis import DISArguments, build_distiller

# Two copies of a model, each spread over two processes; FSDP spreads the parts of a copy once more.
LAYOUTS = {"copied": {"dp_replicate_size": 2}, "FSDP": {"fsdp_size": 2}}
EXAMPLES, WINDOW = 40, 16  # of an optimizer step
CASES = {
    "copied": [(True, "whole", "forward_kl", "per item")],
    "FSDP": [(False, "spread", "forward_kl", "per item")],
}


def share_groups() -> None:
    """Lets all models and trainers of a shape share their groups, whose many threads would slow the run down."""
    own = cache(device_mesh.init_device_mesh)

    def shared(device_type, mesh_shape, mesh_dim_names):
        return own(device_type, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))

    dist.init_device_mesh = device_mesh.init_device_mesh = shared


def train(folders: dict[str, Path], folder: Path, case: tuple, sizes: dict[str, int], **keywords) -> dict:
    given = {"data": data("causal LM")[:EXAMPLES], "one_sample": True, "sizes": sizes, "proposal": "teacher"}
    size = WINDOW // 2 // (2 if sizes else 1)
    order = {"per_device_train_batch_size": size, "train_sampling_strategy": "sequential", "num_tails": 1}
    return models.train(folders, folder, case, **given, **order, **keywords)


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
    folders, results = models.saved(folder), {"world_size": models.processes()}
    for name, sizes in LAYOUTS.items():
        sizes, own = {"tp_size": 2, **sizes} if models.processes() > 1 else {}, folder / name
        results |= {(name, *case): train(folders, own, case, sizes) for case in CASES[name]}
        single = {"dtype": torch.float32}
        results |= {(name, *case, "float32"): train(folders, own, case, sizes, **single) for case in CASES[name]}
        results[name, "own loop"] = own_loop(folders, sizes)
    torch.save(results, folder / f"rank_{int(os.environ.get('RANK', 0))}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
