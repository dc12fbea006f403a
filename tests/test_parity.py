"""benchmarks/parity.py: its table, its command line, and a call that continues earlier records."""

import json
import sys
from types import SimpleNamespace

import parity
import pytest


def record(method, seed, kl, top1=None):
    where = {"task": "glyphs", "rate": 5.0, "method": method, "seed": seed}
    return {**where, "logits": 0.16, "kl": kl, "top1": top1}


def test_a_method_is_compared_over_the_seeds_that_exact_has_too(capsys):
    records = [record("exact", 0, 0.2, 0.6), record("dis", 0, 0.3, 0.59), record("dis", 1, 0.5, 0.49)]
    parity.print_table(records)
    lines = capsys.readouterr().out.splitlines()
    assert "| glyphs | x5 | dis | 16.0% | 2 | 54.0% | 0.4000 | -1.0 | 1.500 |" in lines
    assert "| glyphs | x5 | exact | 16.0% | 1 | 60.0% | 0.2000 |  |  |" in lines


def test_text_has_no_accuracy(capsys):
    parity.print_table([record("exact", 0, 0.2), record("dis", 0, 0.3)])
    assert "| glyphs | x5 | dis | 16.0% | 1 |  | 0.3000 |  | 1.500 |" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--name", "other"], ["--settings", "{}"], []])
def test_flags_that_belong_together_are_asked_for(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["parity.py", *flags, *(["--json", str(tmp_path / "a")] if flags else [])])
    with pytest.raises(SystemExit):
        parity.main()
    assert ("belong together" if flags else "--json is needed") in capsys.readouterr().err


def test_a_student_that_is_in_the_file_is_not_trained_again(monkeypatch, capsys, tmp_path):
    path, trained = tmp_path / "records.jsonl", []
    path.write_text(json.dumps(record("exact", 0, 0.2, 0.6)) + "\n")
    monkeypatch.setitem(parity.TASKS, "glyphs", lambda teacher, folder: None)
    monkeypatch.setattr(
        parity, "train", lambda make, rate, settings, seed, cpu: trained.append(settings) or {**RESULT, "kl": 0.3}
    )
    flags = ["--tasks", "glyphs", "--rates", "5", "--methods", "exact", "dis", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["parity.py", *flags])
    parity.main()
    parity.main()
    assert trained == [{}] and [one["method"] for one in parity.read(path)] == ["exact", "dis"]
    assert "| 1.500 |" in capsys.readouterr().out


RESULT = {"logits": 0.16, "top1": 0.6}


def test_estimated_errors_beside_those_of_probes(capsys):
    probes = [[0.11, 0.1], [0.18, 0.2], [0.3, 0.3]]
    parity.print_errors([record("dis", 0, 0.3), record("probed", 0, 0.3) | {"errors": probes}])
    assert "| glyphs | x5 | probed | 3 | 1.00 | 0.90 | 1.10 |" in capsys.readouterr().out
    parity.print_errors([record("dis", 0, 0.3)])
    assert capsys.readouterr().out == ""


def test_logits_are_the_mean_over_logs_where_the_sizes_change():
    sampler = SimpleNamespace(columns=550, num_sampled=40, num_shared=460)  # and 50 that are stored
    distiller = SimpleNamespace(mode="sampled", num_classes=1000, sampler=sampler)
    logs = [{"dis/num_sampled_classes": 40, "dis/num_shared_classes": size} for size in (60, 160)]
    trainer = SimpleNamespace(distiller=distiller, state=SimpleNamespace(log_history=[*logs, {"eval_kl": 0.1}]))
    assert parity.mean_logits(trainer) == 0.2
    trainer.state.log_history = []
    assert parity.mean_logits(trainer) == 0.55
    distiller.mode = "exact"
    assert parity.mean_logits(trainer) == 1.0
