"""Trainings of a sharded head by processes of which one dies, hangs, or is killed while it saves."""

import os
import re
import subprocess
import sys

import broken_worker as worker
import pytest
import torch

from hf_dis.trainer.manifest import last_whole_checkpoint

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
# Of students in float64 whose rows have moments in bfloat16.
CLOSE = {"rtol": 0, "atol": 2e-3}

# Trainings are killed while this file of a checkpoint is written, and at as many random moments. The slow tests kill
# 20 times, those with other numbers of processes included.
MOMENTS = [
    "model-head.safetensors.part,1",
    pytest.param("optimizer.safetensors.part,5", marks=pytest.mark.slow),
    pytest.param("classes.safetensors.part,5", marks=pytest.mark.slow),
]


def run(folder, *arguments):
    """The output of a run of the worker, and the student of a training that ended."""
    command = [sys.executable, worker.__file__, str(folder), *map(str, arguments)]
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=560)
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("rank_*.log"))
    assert finished.returncode == 0, finished.stderr[-2000:] + logs
    end = folder / "end.pt"
    return finished.stdout, torch.load(end)["student"] if end.exists() else None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted"), 2, 2)[1]


BREAKS = [
    pytest.param(3, "exits", "3", r"Connection (closed|reset) by peer", id="exits"),
    pytest.param(2, "stops", "-9", rf"Timed out waiting {worker.TIMEOUT}000 ?ms", marks=pytest.mark.slow, id="stops"),
]


@pytest.mark.parametrize(("number", "how", "code", "error"), BREAKS)
def test_where_a_process_breaks_the_others_end_with_an_error(tmp_path, number, how, code, error):
    """In the middle of a step; the checkpoints before it are whole."""
    codes, _ = run(tmp_path, number, how)
    assert codes.split() == ["1", code, *["1"] * (number - 2)]
    for rank in {*range(number)} - {1}:
        assert re.search(error, (tmp_path / f"rank_{rank}.log").read_text())
    found, torn = last_whole_checkpoint(tmp_path)
    assert found.endswith("checkpoint-2") and not torn


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_killed_training_ends_as_the_uninterrupted_one(uninterrupted, tmp_path, moments):
    told, student = run(tmp_path, 2, 2, moments)
    name, number = moments.split(",")
    assert told.count("killed") == int(number) + 1
    for name, value in uninterrupted.items():
        assert torch.equal(student[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 4])
def test_another_number_of_processes_ends_nearly_as_the_uninterrupted_one(uninterrupted, tmp_path, number):
    told, student = run(tmp_path, 2, number, "model-head.safetensors.part,3")
    assert told.count("killed") == 4
    for name, value in uninterrupted.items():
        torch.testing.assert_close(student[name], value, msg=name, **CLOSE)
