"""benchmarks/sharded_head.py: a run at sizes too small to measure anything, its loss, and the table of the docs."""

import json
import sys
from unittest import mock

import pytest
import sharded_head
import torch
from pages import ROOT

from hf_dis import VocabShard

FEW, MANY = 100_000, 200_000


def records_of(monkeypatch, path, num_classes, *methods):
    sizes = ["--classes", str(num_classes), "--processes", "2", "--repeats", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["sharded_head.py", *sizes, "--methods", *methods])
    sharded_head.main()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_steps_run_and_what_they_send_does_not_grow_with_the_classes(tmp_path, monkeypatch):
    records = records_of(monkeypatch, tmp_path / "few.jsonl", FEW, *sharded_head.METHODS)
    assert [one["method"] for one in records] == list(sharded_head.METHODS)
    assert all(one["ms"] > 0 and one["peak_mb"] > 0 and one["device"] == "cpu" for one in records)
    (many,) = records_of(monkeypatch, tmp_path / "many.jsonl", MANY, "dis")
    assert 0 < many["bytes"] == records[-1]["bytes"]
    with mock.patch.object(sharded_head, "launch", side_effect=AssertionError("a measurement is made again")):
        assert records_of(monkeypatch, tmp_path / "few.jsonl", FEW, *sharded_head.METHODS) == records


def test_the_loss_over_chosen_classes_is_a_cross_entropy():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    rows, labels = torch.tensor([1, 3, 4, 8, 9]), torch.tensor([3, 1, 9, 4])
    shard = sharded_head.ShardClasses(VocabShard(0, 10))
    loss = sharded_head.SampledCrossEntropy.apply(logits, labels, rows, shard)
    expected = torch.nn.functional.cross_entropy(logits, torch.searchsorted(rows, labels), reduction="none")
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(one.sum(), logits, retain_graph=True)[0] for one in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_the_table_of_the_docs_is_that_of_the_script(capsys):
    sharded_head.print_estimate()
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "distributed.md").read_text()
