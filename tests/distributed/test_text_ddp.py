"""Language models on two real processes, one of which has no supervised token in some steps, against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import text_worker
import torch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes saw of the trainings in text_worker.py."""
    folder = tmp_path_factory.mktemp("two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*torchrun, str(Path(text_worker.__file__)), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [torch.load(folder / f"rank_{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process saw of the same trainings, with two accumulation steps."""
    folder = tmp_path_factory.mktemp("one")
    text_worker.run(folder)
    return torch.load(folder / "rank_0.pt")


@pytest.mark.parametrize("run", text_worker.RUNS)
def test_a_process_without_a_supervised_token_adds_nothing_and_hangs_nobody(ranks, alone, run):
    expected = alone[run]["student"]
    untrained = {n: p.detach() for n, p in text_worker.RUNS[run][0](text_worker.V).named_parameters()}
    assert max(float((expected[name] - untrained[name]).abs().max()) for name in expected) > 1e-3
    for rank in ranks:
        assert rank[run]["losses"] == pytest.approx(alone[run]["losses"], rel=1e-4)
        for name, parameter in expected.items():
            torch.testing.assert_close(rank[run]["student"][name], parameter, rtol=0, atol=2e-6, msg=name)
