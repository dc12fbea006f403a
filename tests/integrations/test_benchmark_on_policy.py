"""benchmarks/on_policy.py: its table, a call that continues earlier records, and times of small steps."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import chats
import on_policy
import pytest

RESULT = {"kl": 0.2, "reverse_kl": 0.3, "log_likelihood": -2.0, "length": 9.0}


class Task:
    """Stands for the task: counts the students, and trains none."""

    made: ClassVar[list] = []

    def __init__(self, folder, use_cpu):
        self.made.clear()

    def distilled(self, divergence, rate, seed, settings):
        self.made.append((divergence, rate, seed, settings))
        return {**RESULT, "reverse_kl": 0.3 + seed / 10}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["on_policy.py", *map(str, arguments)])
    on_policy.main()


def test_a_call_goes_on_with_the_records_of_another(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_policy, "OnPolicyTask", Task)
    file = tmp_path / "records.jsonl"
    flags = ["--json", file, "--divergences", "jsd", "--rates", 4, "--methods", "exact", "dis"]
    run(monkeypatch, *flags)
    assert [made[3] for made in Task.made] == [on_policy.METHODS["exact"], on_policy.METHODS["dis"]]
    run(monkeypatch, *flags, "--seeds", 0, 1)
    assert [made[:3] for made in Task.made] == [("jsd", 4.0, 1)] * 2
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["method"], one["seed"], one["device"]) for one in records] == [
        (method, seed, "cpu") for seed in (0, 1) for method in ("exact", "dis")
    ]
    assert "| jsd | x4 | dis | 2 | 0.350 | 0.300 to 0.400 | 0.200 | -2.000 |" in capsys.readouterr().out


def test_the_page_has_the_times_of_the_records():
    root = Path(__file__).parents[2]
    page = (root / "docs/divergences.md").read_text()
    records = json.loads((root / "benchmarks/results/on_policy_time.json").read_text())
    dis = {(one["divergence"], one["tokens"]): one["ms"] for one in records if one["method"] == "dis"}
    assert len(records) == 16
    for one in records:
        ratio = one["ms"] / dis[one["divergence"], one["tokens"]]
        cells = one["divergence"], f"{one['tokens']:,}", one["method"], f"{one['ms']:,.0f}", f"{ratio:.2f}"
        assert f"| {' | '.join(cells)} |\n" in page


def test_a_call_without_seeds_prints_the_table_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_policy, "OnPolicyTask", None)
    file = tmp_path / "records.jsonl"
    line = {"divergence": "jsd", "rate": 4, "method": "exact", "seed": 0}
    file.write_text(json.dumps({**line, "kl": 0.2, "reverse_kl": 0.3, "log_likelihood": -2.0}) + "\n")
    run(monkeypatch, "--json", file, "--seeds")
    assert "| jsd | x4 | exact | 1 | 0.300 | 0.300 to 0.300 | 0.200 | -2.000 |" in capsys.readouterr().out


def test_students_need_a_file_for_their_records(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--rates", 4)
    assert "--json is needed" in capsys.readouterr().err


def test_settings_are_those_of_the_example():
    assert on_policy.COMMON["max_steps"] == 50 and on_policy.COMMON["learning_rate"] == 1e-3
    assert "head_mode" not in on_policy.COMMON and "num_shared_classes" not in on_policy.COMMON
    assert on_policy.METHODS["dis example"]["num_shared_classes"] == 4096


@pytest.mark.slow
def test_steps_are_timed_without_the_writing(monkeypatch):
    monkeypatch.setattr(on_policy, "VOCABULARY", len(chats.tokenizer()))
    monkeypatch.setattr(on_policy, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(on_policy, "COMPLETION_TOKENS", 4)
    monkeypatch.setattr(on_policy, "FIRST_TOKEN", 10)
    monkeypatch.setattr(on_policy.sft_task, "chat_tokenizer", lambda num_tokens: chats.tokenizer())
    given = SimpleNamespace(divergences=["jsd"], prompts=[2], steps=2, rounds=1)
    records = on_policy.measure_times(given, use_cpu=True)
    assert [one["method"] for one in records] == ["trl", "exact", "dis", "dis dense"]
    assert all(one["ms"] > 0 for one in records)


def test_the_time_of_writing_is_not_counted(monkeypatch):
    now = 0.0

    class Trainer:
        def _generate_and_score_completions(self, inputs):
            nonlocal now
            now += 5.0
            return {}

    monkeypatch.setattr(on_policy.time, "perf_counter", lambda: now)
    trainer = Trainer()
    times = on_policy.WithoutWriting(trainer)
    times.on_step_begin(None, None, None)
    trainer._generate_and_score_completions([])
    now += 0.25
    times.on_step_end(None, None, None)
    assert times.milliseconds == [250.0]


def test_each_method_is_compared_at_its_best_rate(capsys):
    def record(method, rate, seed, kl):
        return {"divergence": "jsd", "rate": rate, "method": method, "seed": seed, "reverse_kl": kl}

    exact = [record("exact", 4.0, seed, kl) for seed, kl in enumerate((0.10, 0.12, 0.99))]
    worse = [record("exact", 8.0, seed, 0.2) for seed in (0, 1)]  # seed 2 does not decide on the rate
    dis = [record("dis", 8.0, seed, kl) for seed, kl in enumerate((0.11, 0.15))]
    on_policy.print_best([*exact, *worse, *dis, record("dis", 4.0, 0, 0.3)])
    assert "| jsd | x4 | x8 | 2 | 0.1100 | 0.1300 | 1.182 | 2.0 | 0.9 |" in capsys.readouterr().out
    on_policy.print_best([exact[0], dis[0]])
    assert capsys.readouterr().out == ""
