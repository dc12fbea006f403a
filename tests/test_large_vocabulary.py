"""benchmarks/large_vocabulary.py: its table, and students of a small vocabulary on a few texts."""

import argparse
import ast
import json
import sys
from pathlib import Path

import clm_task
import large_vocabulary
import pytest
from datasets import Dataset
from peers import NEEDS
from timing import available

RUN = {"tokenizer": "some", "width": 16, "max_steps": 4, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}
RESULT = {"vocab": 300, "steps": 4, "logits": 40, "seconds": 9.0, "cpu_seconds": 2.0, "writing_seconds": 0.0}
RESULT |= {"writing_cpu_seconds": 0.0, "peak_mb": 30.0, "perplexity": 9.0}
SMALL = ["--steps", 4, "--width", 16, "--teacher_width", 16, "--teacher_steps", 3, "--student_steps", 2]
SMALL += ["--evaluations", 2, "--eval_blocks", 3]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["large_vocabulary.py", *map(str, arguments)])
    large_vocabulary.main()


def record(method, kl, **changes):
    return {**RUN, **RESULT, "method": method, "kl": kl, **changes}


def test_the_table_has_means_over_seeds_and_the_ratios_to_exact(capsys):
    records = [record("exact", 0.2, cpu_seconds=8.0, peak_mb=None), record("exact", 0.4, seed=1, cpu_seconds=8.0)]
    records += [record("dis", 0.21), record("dis_cached", 0.3, seed=1, writing_cpu_seconds=1.0)]
    large_vocabulary.print_table(records)
    out = capsys.readouterr().out
    assert "| some | 300 | 0.001 | exact | 2 | 4 | 40 | 2.00 | 1.0 | 8 | 30 | 0.300 | 1.000 | 9.0 |" in out
    assert "| dis | 1 | 4 | 40 | 0.50 | 4.0 | 2 | 30 | 0.210 | 1.050 | 9.0 |" in out
    assert "| dis_cached | 1 | 4 | 40 | 0.25 | 8.0 | 2 | 30 | 0.300 | 0.750 | 9.0 |" in out


def test_the_steps_that_fit_into_the_time_of_dis():
    records = [record("exact", 0.1, cpu_seconds=8.0), record("dis", 0.1, cpu_seconds=4.0), record("dis", 0.1, seed=1)]
    key = {**RUN, "method": "exact_in_time"}
    assert large_vocabulary.steps_in_time(records, key, "cpu_seconds") == 2
    with pytest.raises(ValueError, match="exact_in_time at seed 1 needs the times of exact, which the file does not"):
        large_vocabulary.steps_in_time(records, {**key, "seed": 1}, "seconds")


def test_readme_has_the_figures_of_the_records(capsys):
    root = Path(large_vocabulary.__file__).parents[1]
    large_vocabulary.print_table(large_vocabulary.read(root / "benchmarks/results/large_vocabulary.jsonl"))
    table, readme = capsys.readouterr().out, (root / "README.md").read_text()
    for line in (line for line in table.splitlines() if line.startswith("| gemma3")):
        seconds, peak, kl = (line.split(" | ")[number] for number in (9, 10, 11))
        if " | exact | " in line or " | dis | " in line:
            assert f"KL {kl}, {seconds} s, {peak} MB per step" in readme
        elif " | exact_in_time | " in line:
            assert f"reaches a KL of {kl}" in readme


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tokenizer of 300 tokens and three texts."""
    folder = tmp_path_factory.mktemp("texts")
    texts = []
    for module, name in ((json, "b"), (argparse, "a"), (ast, "c")):
        texts.append(folder / f"{name}.txt")
        texts[-1].write_text(Path(module.__file__).read_text())
    tokenizer = clm_task.train_tokenizer(Dataset.from_dict({"text": [path.read_text() for path in texts]}), 300)
    tokenizer.save_pretrained(folder / "small")
    return "--tokenizer", folder / "small" / "tokenizer.json", "--texts", *texts


def test_a_call_goes_on_with_the_records_of_another(source, monkeypatch, tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    given = [*source, *SMALL, "--json", file, "--folder", tmp_path / "models"]
    run(monkeypatch, *given, "--methods", "exact", "dis")
    before = file.read_text()
    run(monkeypatch, *given)
    assert file.read_text().startswith(before)
    records = {one["method"]: one for one in map(json.loads, file.read_text().splitlines())}
    methods = available(large_vocabulary.METHODS, NEEDS)
    assert list(records) == methods
    for one in records.values():
        assert (one["tokenizer"], one["vocab"], one["max_steps"], one["device"]) == ("small", 300, 4, "cpu")
        assert one["curve"][-1]["step"] == one["steps"] and one["curve"][-1]["kl"] == one["kl"] > 0
        assert one["cpu_seconds"] > 0 and "--texts" in one["command"]
    assert 0 < records["dis_cached"]["writing_seconds"] < records["dis_cached"]["curve"][0]["seconds"]
    # All 300 tokens are sampled here, so that DIS and the peers' approximations are exact distillation.
    assert records["dis"]["kl"] == pytest.approx(records["exact"]["kl"], rel=0.02)
    for peer in set(methods) & set(large_vocabulary.PEERS):
        assert records[peer]["kl"] == pytest.approx(records["exact"]["kl"], rel=1e-4), peer
    assert capsys.readouterr().out.count("Training teacher") == 1
    run(monkeypatch, "--json", file, "--plot", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 500


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--texts", "a"], "--json is needed"),
        (["--texts", "a", "--json", "a"], "--tokenizer and --texts belong together"),
        (["--json", "a"], "a has no records to print"),
    ],
    ids=["no file", "no tokenizer", "no texts"],
)
def test_arguments_that_do_not_suffice(arguments, told, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert told in capsys.readouterr().err


def test_texts_that_do_not_suffice(source, monkeypatch, tmp_path):
    given = [*SMALL, "--json", tmp_path / "records.jsonl", "--folder", tmp_path]
    with pytest.raises(ValueError, match="--texts has 1 file: give two or more"):
        run(monkeypatch, *source[:4], *given)
    with pytest.raises(ValueError, match="900 steps take 3,600 blocks of 128 tokens, and the texts have"):
        run(monkeypatch, *source, *given, "--steps", 900)
