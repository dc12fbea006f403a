"""Starts a worker script in real processes (gloo) and collects their results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def two_processes(script: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs ``script FOLDER ARGUMENTS`` by torchrun; returns the results that each process saved in ``rank_<n>.pt``."""
    return processes(2, script, folder, *arguments)


def alone_and_processes(
    number: int, worker: ModuleType, folders: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results of a worker's ``run`` in this process, and of its script in several processes."""
    folder = folders.mktemp("alone")
    worker.run(folder)
    alone = torch.load(folder / "rank_0.pt", weights_only=False)
    return alone, processes(number, worker.__file__, folders.mktemp("several"))


def processes(number: int, script: str, folder: Path, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """As :func:`two_processes`, for any number of processes, with variables of the environment."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    finished = subprocess.run(
        [*torchrun, script, str(folder), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(number)]
    assert [result["world_size"] for result in results] == [number] * number
    return results
