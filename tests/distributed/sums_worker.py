"""Runs of test_sums, forked by launch.py in two processes: sums, means and decisions of hf_dis.distributed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_dis.distributed import processes
from hf_dis.distributed.sums import average_rows, sum_over_processes

CLASSES, WIDTH = 9, 3
# Rows of each process; None: no gradient.
TOUCHED = {
    "some": [[1, 4, 8], [4]],
    "none": [[0, 2], []],
    "no gradient": [[0, 2], None],
    "nowhere": [[], []],
    "no gradient anywhere": [None, None],
    "twice": [[4, 1, 4], [1, 1, 0]],  # as batches that are accumulated leave them
    "dense": [list(range(CLASSES)), list(range(CLASSES))],
    "dense and some": [list(range(CLASSES)), [5]],
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gradient(ids: list[int], rank: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    """Rows of a gradient, of a weight or, with width 0, of a bias."""
    rows = torch.arange(1.0, len(ids) * max(1, width) + 1).view(len(ids), *([width] if width else [])) * (rank + 1)
    shape = (CLASSES, width) if width else (CLASSES,)
    return torch.sparse_coo_tensor(torch.tensor(ids, dtype=torch.long)[None], rows.to(dtype), shape)


def averaged(case: str, rank: int, dtype: torch.dtype, width: int = WIDTH) -> Tensor:
    ids = TOUCHED[case][rank]
    parameter = nn.Parameter(torch.zeros((CLASSES, width) if width else (CLASSES,), dtype=dtype))
    if ids is not None:
        found = gradient(ids, rank, dtype, width)
        parameter.grad = found.to_dense() if len(ids) == CLASSES else found
    average_rows([parameter])
    return parameter.grad


def large(rank: int) -> Tensor:
    """The mean of two float16 gradients whose sum is out of range."""
    parameter = nn.Parameter(torch.zeros(CLASSES, WIDTH, dtype=torch.float16))
    parameter.grad = torch.sparse_coo_tensor(torch.tensor([[2]]), torch.full((1, WIDTH), 4e4).half(), (CLASSES, WIDTH))
    average_rows([parameter])
    return parameter.grad


def of_ddp(rank: int) -> dict:
    """A model whose head is kept out of the reduction; the processes start from different parameters."""
    torch.manual_seed(rank)
    model = nn.ModuleDict({"body": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, CLASSES)})
    model._ddp_params_and_buffers_to_ignore = ["head.bias"]
    model.forward = lambda values: model["head"](model["body"](values))
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with processes.kept_from_ddp(model, ["head"]):
        wrapped = DistributedDataParallel(model)
    shared = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapped(torch.full((1, WIDTH), rank + 1.0)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"own": own, "shared": shared, "gradients": gradients, "left": model._ddp_params_and_buffers_to_ignore}


def run(folder: Path) -> None:
    device = processes.start_processes()
    processes.start_processes()  # again, as a second cache that a script writes
    rank, computed = processes.process_index(), []
    if rank == 1:
        time.sleep(0.5)
        (folder / "was there").touch()
    processes.wait_for_everyone()
    results = {
        "world_size": processes.num_processes(),
        "device": device.type,
        "rank": rank,
        "waited": (folder / "was there").exists(),
        "first of machine": processes.is_first_of_machine(),
        "decided": processes.of_first_process(lambda: computed.append(rank) or {"from": rank}),
        "computed": computed,
        "ddp": of_ddp(rank),
        "large": large(rank),
    }
    with mock.patch.dict(os.environ, LOCAL_RANK="0"):  # as on a machine of its own
        results["first of its own machine"] = processes.is_first_of_machine()
    with mock.patch.dict(os.environ):  # as started without a launcher
        del os.environ["LOCAL_RANK"]
        results["first of all"] = processes.is_first_of_machine()
    for case in TOUCHED:
        for dtype in DTYPES:
            results[case, dtype] = averaged(case, rank, dtype)
        results[case, "bias"] = averaged(case, rank, torch.float32, width=0)
    statistics = {
        "rows": gradient(TOUCHED["twice"][rank], rank),
        "dense": torch.full((3,), rank + 1.0),
        "not contiguous": torch.arange(6.0).view(2, 3).T * (rank + 1),
        "number": torch.tensor(rank + 1),
    }
    results["sums"], results["statistics"] = sum_over_processes(statistics), statistics
    torch.save(results, folder / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
