"""benchmarks/tied_head.py at sizes too small to measure anything: its records, and one step of every method."""

import json
import sys

import pytest
import tied_head

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16}


@pytest.mark.slow
def test_methods_step_in_turn(monkeypatch, tmp_path, capsys):
    for name in ("SHAPE", "TEACHER"):
        monkeypatch.setattr(tied_head, name, SMALL)
    monkeypatch.setattr(tied_head, "VOCABULARY", 3000)
    monkeypatch.setattr(
        sys, "argv", ["tied_head.py", "--tokens", "256", "--steps", "1", "--json", str(tmp_path / "tied.json")]
    )
    tied_head.main()
    records = json.loads((tmp_path / "tied.json").read_text())
    assert [one["method"] for one in records] == list(tied_head.METHODS)
    assert all(one["seconds"] > 0 and one["tokens"] == 256 for one in records) and records[0]["ratio"] == 1
    assert "| 256 | exact |" in capsys.readouterr().out
