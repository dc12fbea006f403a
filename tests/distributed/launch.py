"""Starts a worker script in real processes (gloo) and collects their results."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing import connection, forkserver
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

TIMEOUT = 560  # seconds
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def two_processes(script: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs ``script FOLDER ARGUMENTS`` in two processes; returns the results that each saved in ``rank_<n>.pt``."""
    return processes(2, script, folder, *arguments)


def alone_and_processes(
    number: int, worker: ModuleType, folders: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results of a worker's ``run`` in this process, and of its script in several processes."""
    folder = folders.mktemp("alone")
    worker.run(folder)
    alone = torch.load(folder / "rank_0.pt", weights_only=False)
    return alone, processes(number, worker.__file__, folders.mktemp("several"))


def processes(number: int, script: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """As :func:`two_processes`, for any number of processes.

    The processes are forked from a server that has imported hf_dis, so that none of them imports it again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_dis"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    port, command = free_port(), [script, str(folder), *arguments]
    started = [context.Process(target=_work, args=(rank, number, port, command)) for rank in range(number)]
    for process in started:
        process.start()
    _wait(started, folder)
    return _results(number, folder)


def by_torchrun(number: int, script: str, folder: Path, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    """As :func:`processes`, by torchrun, with variables of the environment that libraries read at their import."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    finished = subprocess.run(
        [*torchrun, script, str(folder), *arguments],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return _results(number, folder)


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def become(rank: int, number: int, port: int, folder: Path) -> None:
    """Makes this process the process ``rank`` of ``number``, by torchrun's variables; its output is a file's."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()} | {"MASTER_ADDR": "localhost"})
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _work(rank: int, number: int, port: int, command: list[str]) -> None:
    """Runs a script with its arguments, its folder first, as the process ``rank`` of ``number``."""
    become(rank, number, port, Path(command[1]))
    os.environ.update(ENVIRONMENT)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def _wait(started: list[multiprocessing.process.BaseProcess], folder: Path) -> None:
    """Waits for processes; where one fails or time is up, all processes are killed."""
    end = time.monotonic() + TIMEOUT
    while any(process.exitcode is None for process in started):
        running = [process.sentinel for process in started if process.exitcode is None]
        ended = connection.wait(running, timeout=end - time.monotonic())
        if not ended or any(process.exitcode for process in started):
            break
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank_*.log")))
    reason = f"None: killed after {TIMEOUT} s, or since another process failed"
    assert codes == [0] * len(started), f"exit codes {codes} ({reason})\n{logs}"


def _results(number: int, folder: Path) -> list[dict[str, Any]]:
    results = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(number)]
    assert [result["world_size"] for result in results] == [number] * number
    return results
