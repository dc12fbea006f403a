"""Writing a cache by processes that are killed, and by two at once: the same files as by one that was left alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import cache_worker
import pytest

from hf_dis import TeacherCache
from hf_dis.data import DataError

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
SCRIPT = str(Path(cache_worker.__file__))


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("alone")
    cache_worker.write(path)
    return files(path)


def test_a_killed_process_loses_no_shard(expected, tmp_path):
    path = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, SCRIPT, str(path), "0.2"], env=ENVIRONMENT)
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


def test_two_processes_write_what_one_does(expected, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*torchrun, SCRIPT, str(tmp_path), "0"], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert files(tmp_path) == expected
