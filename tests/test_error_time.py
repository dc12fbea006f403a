"""benchmarks/error_time.py: a run on a tiny task, whose estimates are counted and timed."""

import json
import sys

import error_time
import pytest
from timing import Stopwatch
from tiny_models import labelled_images, vit

from hf_dis import DISConfig, DISDistillationTrainer

SIZES = {"num_sampled_classes": 4, "num_shared_classes": 16, "num_tails": 2}


@pytest.fixture
def make():
    """The trainers of a ViT of 100 classes."""
    data = labelled_images(48, 100)

    def trainer(rate, **settings):
        common = {"per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no", "head_mode": "sampled"}
        sizes = {} if "gradient_error" in settings else SIZES
        args = DISConfig(learning_rate=1e-3 * rate, **common, **sizes, **settings)
        return DISDistillationTrainer(vit(100), vit(100, seed=1), args, train_dataset=data)

    return trainer


def test_estimates_of_every_tenth_step_are_timed(make, monkeypatch, tmp_path, capsys):
    file, clock = tmp_path / "records.jsonl", iter(range(1000))
    monkeypatch.setattr(error_time, "TASKS", {"glyphs": lambda teacher, folder: make})
    monkeypatch.setattr(error_time, "stopwatch", lambda device, cpu_time: Stopwatch(lambda: next(clock)))
    monkeypatch.setattr(sys, "argv", f"error_time.py --steps 12 --tasks glyphs --json {file}".split())
    error_time.main()
    for line, name in zip(file.read_text().splitlines(), ("logged", "followed"), strict=True):
        record = json.loads(line)
        assert (record["error"], record["estimates"], record["steps"]) == (name, 2, 12)
        # The clock ticks at its calls: twice for each estimate, and once at the end of the steps.
        assert (record["estimates_s"], record["steps_s"]) == (2, 5)
    assert "| glyphs | followed | 2 | 12 | 1000 | 417 | 40.0% |" in capsys.readouterr().out


def test_a_file_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["error_time.py"])
    with pytest.raises(SystemExit):
        error_time.main()
    assert "--json is needed" in capsys.readouterr().err
