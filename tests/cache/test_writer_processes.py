"""Writing a cache by processes that are killed, and by two at once: the same files as by one that was left alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import cache_worker
import pytest
import torch

from hf_dis import TeacherCache
from hf_dis.distributed.processes import joined_processes
from hf_dis.errors import DataError

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
SCRIPT = str(Path(cache_worker.__file__))
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")
    cache_worker.write(path)
    return files(path)


@pytest.mark.slow
def test_a_killed_process_loses_no_shard(expected, tmp_path):
    path = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, SCRIPT, str(path), "0.2", "none"], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while len(list(path.glob("*.arrow"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    done = {file: file.stat().st_mtime_ns for file in path.glob("*.arrow")}
    assert 3 <= len(done) < cache_worker.NUM_SHARDS
    with pytest.raises(DataError, match="half-written"):
        TeacherCache(path)
    cache_worker.write(path)
    assert files(path) == expected
    assert {file: file.stat().st_mtime_ns for file in done} == done


@pytest.mark.parametrize(
    ("launcher", "group"),
    [
        ("torchrun", "none"),
        pytest.param("accelerate", "none", marks=pytest.mark.slow),
        pytest.param("torchrun", "ours", marks=pytest.mark.slow),
    ],
)
def test_two_processes_write_what_one_does(expected, tmp_path, launcher, group):
    """Two caches in one script, which starts the process group itself or leaves it to the writer.

    The worker checks that the shards are divided, and that the writer ends the group that it started, and no other.
    """
    folders = [tmp_path / "first", tmp_path / "second"]
    finished = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], SCRIPT, str(folders[0]), "0", group, str(folders[1])],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "terminate called" not in finished.stderr
    assert files(folders[0]) == files(folders[1]) == expected


def test_without_a_launcher_no_process_group_is_started():
    with joined_processes():
        assert not torch.distributed.is_initialized()


def test_a_launcher_may_ask_for_the_processor(monkeypatch):
    """As ``accelerate launch --cpu`` does on a machine with an accelerator."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for value, device in (("True", "cpu"), ("False", "cuda")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
        with joined_processes() as found:
            assert found.type == device
