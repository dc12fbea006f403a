"""Several machines: the commands of docs/distributed.md, with two launches in place of two machines."""

import os
import re
import shlex
import subprocess
import sys

import machines_worker as worker
import pytest
from accelerate.commands.launch import launch_command_parser
from pages import ROOT
from torch.distributed.run import get_args_parser

PAGE = ROOT / "docs" / "distributed.md"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def lines(start):
    """The commands of the page for several machines that start with some words."""
    found = [
        shlex.split(line) for line in re.findall(rf"^(?: {{4}}|srun )({start} .*)$", PAGE.read_text(), re.MULTILINE)
    ]
    return [line for line in found if {"--nnodes", "--num_machines"} & {*line}]


def launched(folder, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", *arguments, worker.__file__, str(folder)]


def test_the_commands_are_understood():
    plain, slurm = lines("torchrun")
    for line in (plain, slurm):
        given = [re.sub(r"^\$SLURM_\w+$", "8", word) for word in line[1:]]
        parsed = get_args_parser().parse_args(given)
        assert (parsed.nnodes, parsed.rdzv_backend, parsed.training_script) == ("8", "c10d", "train.py")
    (line,) = lines("accelerate launch")
    parsed = launch_command_parser().parse_args(line[2:])
    assert (parsed.num_machines, parsed.num_processes, parsed.training_script) == (8, 64, "train.py")


@pytest.mark.slow
def test_two_machines_find_each_other(tmp_path):
    """The command of the page, with two processes on each of two machines that are this one."""
    line = lines("torchrun")[0][1:-1]
    values = {"--nnodes": "2", "--nproc_per_node": "2", "--rdzv_endpoint": "localhost:29517"}
    given = [values.get(before, word) for before, word in zip(["", *line], line, strict=False)]
    command = [*launched(tmp_path, *given)]
    started = [subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in started:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors[-3000:]
    found = [(tmp_path / f"rank_{rank}").read_text().split() for rank in range(4)]
    assert [machine for machine, _ in found] == ["0", "0", "1", "1"]
    assert {total for _, total in found} == {"15"}
