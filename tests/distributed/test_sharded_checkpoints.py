"""Checkpoints of sharded heads: resumed by any number of processes, and loaded by ``from_pretrained``."""

import json
import re
import sys
from pathlib import Path

import pytest
import sharded_checkpoint_worker as worker
import torch
from launch import by_torchrun, processes
from safetensors.torch import load_file
from transformers import ViTForImageClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from hub_server import TOKEN, LocalHub

from hf_dis.errors import DataError
from hf_dis.head.sharded import ShardedHead
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.trainer.row_files import read_rows, write_rows
from hf_dis.trainer.sharded_files import HEAD, MOMENTS

# A row's number on its process, and so the rounding of its moments, depends on the number of processes.
CLOSE = {kind: {"rtol": 0, "atol": 1e-7} for kind in ("row-sparse", "dense")}
CLOSE["bfloat16"] = {"rtol": 2**-6, "atol": 1e-3}


@pytest.fixture(scope="module")
def server():
    with LocalHub() as running:
        yield running


@pytest.fixture(scope="module")
def saved(tmp_path_factory, server):
    """The folder and the result of an uninterrupted training by two processes."""
    folder = tmp_path_factory.mktemp("saved")
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": TOKEN}
    return folder, by_torchrun(2, worker.__file__, folder, HF_HUB_DISABLE_XET="1", **hub)[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_resumed_training_ends_as_the_uninterrupted_one(saved, number):
    folder, expected = saved
    for rank in processes(number, worker.__file__, folder, "resume"):
        for kind in worker.KINDS:
            assert rank[kind].keys() == expected[kind].keys()
            for name, value in expected[kind].items():
                if number == 2:
                    assert torch.equal(rank[kind][name], value), name
                else:
                    torch.testing.assert_close(rank[kind][name], value, msg=name, **CLOSE[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", worker.KINDS)
def test_the_saved_student_is_an_ordinary_one(saved, kind):
    folder, result = saved
    for checkpoint in (folder / kind, folder / kind / f"checkpoint-{worker.STEPS}"):
        model = ViTForImageClassification.from_pretrained(checkpoint, dtype=torch.float64)
        assert type(model.classifier) is torch.nn.Linear
        for name, value in model.state_dict().items():
            assert torch.equal(value, result[kind][name]), name
        listed = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(listed.values()) == {HEAD, "model-body.safetensors"}
    assert len(load_file(folder / kind / f"checkpoint-{worker.STEPS}" / MOMENTS)["weight.exp_avg"]) == 41


def test_the_published_student_is_an_ordinary_one(saved, server, tmp_path):
    _, result = saved
    files = server.files["tester/sharded"]
    assert {"README.md", "config.json", HEAD, "model-body.safetensors", "model.safetensors.index.json"} <= files.keys()
    assert not [name for name in files if re.search("optimizer|dis_state|rng_state", name)]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    model = ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    for name, value in model.state_dict().items():
        assert torch.equal(value, result["dense"][name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_read_as_they_were_written(tmp_path, dtype):
    rows = {"weight": torch.randn(7, 3).to(dtype), "bias": torch.randn(7).to(dtype)}
    write_rows(tmp_path / "rows.safetensors", rows, VocabShard(0, 7), 7)
    assert {name: value.tolist() for name, value in load_file(tmp_path / "rows.safetensors").items()} == {
        name: value.tolist() for name, value in rows.items()
    }
    found = read_rows(tmp_path / "rows.safetensors", VocabShard(2, 5), 7)
    assert all(torch.equal(found[name], value[2:5]) for name, value in rows.items())


def test_rows_of_another_head_or_none_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"rows\.safetensors is missing"):
        read_rows(tmp_path / "rows.safetensors", VocabShard(0, 7), 7)
    write_rows(tmp_path / "rows.safetensors", {"weight": torch.randn(7, 3)}, VocabShard(0, 7), 7)
    with pytest.raises(DataError, match=re.escape("weight has 7 rows") + ".*the head has 9 classes"):
        read_rows(tmp_path / "rows.safetensors", VocabShard(0, 9), 9)


def test_the_initial_rows_do_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr("hf_dis.head.sharded.BLOCK_ROWS", 4)
    whole, part = ShardedHead(3, 11, seed=5), ShardedHead(3, 11, seed=6)
    part.shard = VocabShard(3, 9)
    part.weight, part.bias = torch.nn.Parameter(torch.zeros(6, 3)), torch.nn.Parameter(torch.zeros(6))
    part.initialise(5)
    assert torch.equal(part.weight, whole.weight[3:9]) and torch.equal(part.bias, whole.bias[3:9])
