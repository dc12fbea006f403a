"""benchmarks/items.py: its table, a call that continues earlier records, and the shares of the sample."""

import json
import sys

import items
import pytest
import torch

from hf_dis.items import Items

RUN = {"data": "simulated 300", "width": 16, "batch_users": 8, "max_steps": 4, "rate": 4.0, "seed": 0, "device": "cpu"}
RESULT = {"items": 300, "steps": 4, "logits": 12, "seconds": 9.0, "cpu_seconds": 2.0, "peak_mb": 30.0, "recall10": 0.2}
RESULT |= {"writing_seconds": 4.0, "writing_cpu_seconds": 0.0}
SMALL = ["--simulate", 300, "--users", 60, "--steps", 4, "--batch_users", 8, "--width", 16, "--teacher_width", 16]
SMALL += ["--teacher_steps", 2, "--evaluations", 2, "--eval_users", 20]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["items.py", *map(str, arguments)])
    items.main()


def record(method, ndcg10, **changes):
    return {**RUN, **RESULT, "method": method, "ndcg10": ndcg10, "in_sample": [], **changes}


def test_the_table_has_means_over_seeds_and_the_ratio_to_exact(capsys):
    shares = [{"top10_in_sample": 0.25, "top10_in_tail": 0.1}, {"top10_in_sample": 0.75, "top10_in_tail": 0.2}]
    records = [record("exact", 0.10, peak_mb=None), record("exact", 0.2, seed=1)]
    records += [record("dis", 0.11, in_sample=shares), record("dis_cached", 0.11, writing_cpu_seconds=1.0)]
    items.print_table(records)
    out = capsys.readouterr().out
    assert "| simulated 300 | x4 | exact | 2 | 4 | 12 | 0.500 | 2 | 30 | 0.1500 | 0.2000 | 1.000 |  |  |" in out
    assert "| dis_cached | 1 | 4 | 12 | 0.250 | 2 |" in out
    assert "| dis | 1 | 4 | 12 | 0.500 | 2 | 30 | 0.1100 | 0.2000 | 1.100 | 25% to 75% | 10% to 20% |" in out


def test_the_steps_that_fit_into_the_time_of_dis():
    records = [record("exact", 0.1, cpu_seconds=8.0), record("dis", 0.1), record("dis", 0.1, seed=1)]
    key = {**RUN, "method": "exact_in_time"}
    assert items.steps_in_time(records, key, "cpu_seconds") == 1
    assert items.steps_in_time(records, key, "seconds") == 4
    with pytest.raises(
        ValueError, match="exact_in_time at rate 4 and seed 1 needs the times of exact, which the file"
    ):
        items.steps_in_time(records, {**key, "seed": 1}, "seconds")


def test_a_call_goes_on_with_the_records_of_another(monkeypatch, tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    given = [*SMALL, "--json", file, "--folder", tmp_path / "models", "--plot", tmp_path / "plot.svg"]
    run(monkeypatch, *given, "--methods", "exact", "dis")
    before = file.read_text()
    methods = ["exact", "dis", "dis_cached", "topk", "exact_in_time", "topk_bucket", "negatives"]
    run(monkeypatch, *given, "--methods", *methods)
    assert file.read_text().startswith(before)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["method"] for one in records] == methods
    for one in records:
        assert (one["data"], one["items"], one["device"]) == ("simulated 300", 300, "cpu") and one["torch"]
        assert one["curve"][-1]["step"] == one["steps"] and one["cpu_seconds"] > 0 and "--simulate" in one["command"]
    exact, dis, cached, topk, _, bucket, negatives = records
    assert (bucket["logits"], negatives["logits"]) == (301, items.PEER_ITEMS) and bucket["in_sample"] == []
    assert 0 < cached["writing_seconds"] < cached["curve"][0]["seconds"] and dis["writing_seconds"] == 0
    assert len(cached["in_sample"]) == 2
    assert exact["in_sample"] == [] and len(dis["in_sample"]) == len(topk["in_sample"]) == 2
    for share in dis["in_sample"]:
        assert share["top10_in_sample"] == 1 and 0 < share["top10_in_tail"] <= 1  # 1,024 of the 300 are all
    assert all(share["top10_in_tail"] == 0 < share["top10_in_sample"] < 1 for share in topk["in_sample"])
    assert capsys.readouterr().out.count("Training the teacher") == 1
    assert (tmp_path / "plot.svg").stat().st_size > 500


def test_a_plot_has_the_students_of_the_first_catalogue_and_seed():
    records = [record("exact", 0.1), record("dis", 0.1), record("dis", 0.1, data="other"), record("dis", 0.1, seed=1)]
    assert items.students.of_first(records, items.KEY) == records[:2]


def test_the_records_need_a_file_and_the_data_a_source(monkeypatch, capsys):
    for arguments, told in ((["--simulate", 300], "--json is needed"), (["--json", "a"], "a has no records to print")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments)
        assert told in capsys.readouterr().err


def test_shares_of_the_students_best_items_by_definition():
    catalogue = items.item_data.simulate(300, 12)
    model = items.item_task.build(catalogue.num_classes, 16, 1, seed=0)
    batch = items.item_task.collate(catalogue.training(50).select(range(6)))
    labels = batch.pop("labels")
    places = (torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100).flatten().nonzero()[:, 0]
    with torch.no_grad():
        top = model(**batch).logits.flatten(0, 1)[places, 1:].topk(10).indices + 1
    number = len(places)
    generator = torch.Generator().manual_seed(0)
    item_ids, tail_ids = (torch.randint(1, 301, size, generator=generator) for size in ((number, 20), (3, 40)))
    sample = type("Sample", (), {"item_ids": item_ids, "tail_ids": tail_ids})
    made = Items(len(labels), positions=places, length=labels.shape[1])
    found = items.shares_in_sample(model, type("Step", (), {"inputs": batch, "items": made, "sample": sample}))
    for item in range(min(64, number)):
        own, tail = set(item_ids[item].tolist()), set(tail_ids[item % 3].tolist())
        best = set(top[item].tolist())
        assert float(found["top10_in_sample"][item]) == pytest.approx(len(best & (own | tail)) / 10)
        assert float(found["top10_in_tail"][item]) == pytest.approx(len(best & tail) / 10)
    assert len(found["top10_in_tail"]) == min(64, number)
