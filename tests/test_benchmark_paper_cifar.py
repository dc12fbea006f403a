"""benchmarks/paper_cifar.py: its runs, its table, the images with the teacher's logits, and a call that continues."""

import json
import sys

import cifar_task
import numpy as np
import paper_cifar
import pytest
import torch
from archives import write_cifar100_archive

from hf_dis.cache import SeededViews
from hf_dis.data import load_cifar100

RUN = {"teacher_depth": 8, "depth": 8, "epochs": 1, "temperature": 4.0, "rate": 1.0, "sampled": None, "seed": 0}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Calls the script with a file of records, and returns its output."""

    def call(*arguments):
        given = ["paper_cifar.py", "--json", tmp_path / "records.jsonl", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        paper_cifar.main()
        return capsys.readouterr().out

    return call


def record(method, top1, **changes):
    return {**RUN, "method": method, "top1": top1, "kl": 0.5, "seconds": 1800.0, **changes}


def test_the_table_compares_the_same_seeds_temperature_and_rate(capsys):
    records = [record("exact", 0.50), record("exact", 0.54, seed=1), record("dis", 0.51, sampled=5)]
    records += [record("exact", 0.4, rate=2.0), record("dis", 0.45, rate=2.0, sampled=5)]
    paper_cifar.print_table(records)
    out = capsys.readouterr().out
    assert "| 4 | x1 | exact |  | 2 | 52.0% | 2.8 | +0.0 | 0.500 |" in out
    assert "| 4 | x1 | dis | 5 | 1 | 51.0% |  | +1.0 | 0.500 |" in out
    assert "| 4 | x2 | dis | 5 | 1 | 45.0% |  | +5.0 | 0.500 |" in out


def test_a_method_of_one_seed_and_the_hours_that_are_left(run, tmp_path):
    given = ["--data_dir", "no matter", "--methods", "labels", "exact", "dis", "--sampled", 5, 10, "--seeds", 0, 1]
    (tmp_path / "records.jsonl").write_text(json.dumps(record("exact", 0.5, teacher_depth=20, epochs=12)) + "\n")
    assert "6 runs are left: 3.0 hours" in run(*given, "--hours")  # labels, and twice exact and two of DIS, less one


@pytest.mark.parametrize("method", paper_cifar.SAMPLED)
def test_every_method_samples_k_classes(method):
    settings = paper_cifar.settings_of(method, 10)
    assert settings["num_sampled_classes"] + settings["num_shared_classes"] == 10


@pytest.mark.parametrize("depth", [7, 2, 21])
def test_a_depth_that_is_no_residual_network(depth):
    with pytest.raises(ValueError, match=rf"depth is {depth}: it has to be 6 n \+ 2"):
        cifar_task.CifarResNetConfig(depth)


def test_the_network_of_20_layers_has_its_published_size():
    model = cifar_task.CifarResNet(cifar_task.CifarResNetConfig(20, 10))
    shortcuts = sum(one.numel() for name, one in model.named_parameters() if "shortcut" in name)
    assert sum(one.numel() for one in model.parameters()) - shortcuts == 269_722  # 0.27 M, table 6 of arXiv 1512.03385


def test_stored_logits_are_of_the_stored_view(tmp_path):
    archive = write_cifar100_archive(tmp_path, train=6, test=3)
    split = load_cifar100(archive, verify_checksum=False, cache_dir=tmp_path / "cache")["train"]
    views = SeededViews(cifar_task.Images(split, is_augmented=True), 3)
    teacher = cifar_task.CifarResNet(cifar_task.CifarResNetConfig(8)).eval()
    (tmp_path / "train.part").mkdir()  # of a run that was stopped
    dataset = cifar_task.stored_views(teacher, views, tmp_path / "train")
    assert len(dataset) == 18
    for index in (0, 7, 17):
        one, view = dataset[index], views[index]
        assert torch.equal(one["pixel_values"], view["pixel_values"]) and one["labels"] == view["labels"]
        expected = teacher(view["pixel_values"][None]).logits[0]
        torch.testing.assert_close(one["stored_logits"], expected, atol=5e-3, rtol=5e-3)
    assert not torch.equal(dataset[1]["pixel_values"], dataset[7]["pixel_values"])
    changed = np.load(tmp_path / "train/logits.npy")
    changed[0] = 1
    np.save(tmp_path / "train/logits.npy", changed)  # read, not computed again
    assert (cifar_task.stored_views(teacher, views, tmp_path / "train").logits[0] == 1).all()


def test_a_call_goes_on_with_the_records_of_another(run, tmp_path):
    data = write_cifar100_archive(tmp_path, train=40, test=20)
    given = ["--data_dir", data, "--no_verify_checksum", "--images", 30, "--epochs", 1, "--teacher_epochs", 1]
    given += ["--depth", 8, "--teacher_depth", 8, "--sampled", 4, "--seeds", 0, "--folder", tmp_path / "models"]
    run(*given, "--methods", "exact", "dis")
    before = (tmp_path / "records.jsonl").read_text()
    out = run(*given)
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert (tmp_path / "records.jsonl").read_text().startswith(before)
    assert [one["method"] for one in records] == ["exact", "dis", "labels", *list(paper_cifar.SAMPLED)[1:]]
    assert {one["steps"] for one in records} == {1}
    assert run("--plot", tmp_path / "plot.svg").count("| x1 |") == len(paper_cifar.METHODS) == out.count("| x1 |")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_bad_input(run, capsys):
    for given, message in (
        ((), "has no records to print: give --data_dir"),
        (("--data_dir", "no matter", "--sampled", 1), "K has to be 2 or more"),
    ):
        with pytest.raises(SystemExit):
            run(*given)
        assert message in capsys.readouterr().err
