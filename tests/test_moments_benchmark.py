"""benchmarks/moments.py: its table is that of the page, and a small run."""

import json
import sys

import moments
import pytest
from pages import ROOT


def test_the_table_of_the_page_is_that_of_the_records(capsys):
    records = json.loads((ROOT / "benchmarks/results/moments.json").read_text())
    moments.print_table(records)
    assert capsys.readouterr().out in (ROOT / "docs/optimizer.md").read_text()
    kl = {(one["moments"], one["seed"]): one["kl"] for one in records}
    assert f"differ by {kl['float32', 0] - kl['float32', 1]:.3f} in KL" in (ROOT / "docs/optimizer.md").read_text()


@pytest.mark.slow
def test_a_small_run(monkeypatch, capsys, tmp_path):
    file = tmp_path / "records.json"
    small = "--num_items 300 --users 60 --steps 2 --teacher_steps 2 --width 16 --seeds 0"
    monkeypatch.setattr(sys, "argv", ["moments.py", "--json", str(file), *small.split()])
    moments.main()
    found = {one["moments"]: one for one in json.loads(file.read_text())}
    assert found["bfloat16"]["moments_bytes"] == 64 and found["float32"]["moments_bytes"] == 128
    assert "| bfloat16 | 16 | 64 | 64 | 20 | 1 |" in capsys.readouterr().out
