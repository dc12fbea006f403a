"""The benchmarks: what they make of their records, and that each runs (at sizes that say nothing)."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import crossover
import estimator_error
import head_scaling
import language_model
import plots
import proposal_variants
import quality_vs_k
import training_step


def test_the_crossover_lies_between_the_sizes_around_it():
    records = [{"classes": classes, "ratio": classes / 4_000} for classes in (1_000, 3_000, 10_000)]
    assert crossover.crossover(records) == pytest.approx(4_000)
    assert crossover.crossover(records[:2]) is None


def test_exact_is_extrapolated_from_the_most_classes_it_ran_with():
    runs = [(1_000, 5.0, False), (10_000, 40.0, False), (100_000, 1.0, True)]
    records = [{"method": "exact", "classes": c, "ms": ms, "extrapolated": guess} for c, ms, guess in runs]
    assert head_scaling.extrapolated(records, 1_000_000) == pytest.approx(4_000)


def test_quality_is_the_mean_over_seeds_and_time_the_latest():
    run = {"method": "dis", "head_rate": 20, "logits": 128, "rows_touched": 99, "top5": 0.9, "kl": 0.2}
    records = [
        {**run, "seed": 0, "top1": 0.60},
        {**run, "seed": 1, "top1": 0.62},
        {**run, "seed": 0, "head_rate": 5, "top1": 0.5},
        {"method": "dis", "student_ms": 9.0},
        {"method": "dis", "student_ms": 7.0},
    ]
    best, other = quality_vs_k.summary(records)
    assert (best["seeds"], best["top1"], best["spread"]) == (2, pytest.approx(0.61), pytest.approx(0.02))
    assert (other["head_rate"], other["seeds"], other["student_ms"]) == (5, 1, 7.0)
    assert "| dis | 128 (3.8%) | 99 | x20 | 2 | 61.0% |" in quality_vs_k.table([best, other])


def test_the_students_side_of_a_step_is_all_but_the_teachers(monkeypatch):
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds

    def chunks(inputs, items):
        for seconds in (3, 4):
            work(seconds)
            yield seconds

    monkeypatch.setattr(quality_vs_k.time, "perf_counter", lambda: now)
    teacher = quality_vs_k.TimedStream(chunks)
    times = quality_vs_k.StudentTime(teacher)
    for _ in range(2):
        times.on_step_begin(None, None, None)
        for _ in teacher({}, None):
            work(10)
        work(5)
        times.on_step_end(None, None, None)
    assert times.milliseconds == [25_000, 25_000]


def main(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_the_timings_run_and_are_drawn(tmp_path, monkeypatch, capsys):
    scaling, crossing = tmp_path / "scaling.json", tmp_path / "crossing.json"
    few = ["--classes", 300, 900, "--repeats", 1]
    main(head_scaling, monkeypatch, *few, "--dense_up_to", 300, "--no_peaks", "--json", scaling)
    main(crossover, monkeypatch, *few, "--base_classes", 1200, "--json", crossing)
    assert "extrapolated" in capsys.readouterr().out
    methods = {record["method"] for record in json.loads(scaling.read_text())}
    assert {"exact", "chunked_exact", "partial_fc", "dis_dense", "dis_row_sparse"} <= methods
    main(plots, monkeypatch, "--head_scaling", scaling, "--crossover", crossing, "--output_dir", tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"head_scaling.png", "crossover.png"}


@pytest.mark.slow
def test_training_steps_run_and_are_drawn(tmp_path, monkeypatch, capsys):
    written = tmp_path / "steps.json"
    main(training_step, monkeypatch, "--classes", 700, "--steps", 1, "--rounds", 1, "--json", written)
    records = json.loads(written.read_text())
    assert [(record["method"], record["layout"]) for record in records] == list(training_step.METHODS)
    assert all(record["ratio_to_floor"] > 0 for record in records)
    assert "| all update |" in capsys.readouterr().out
    main(plots, monkeypatch, "--training_step", written, "--output_dir", tmp_path)
    assert (tmp_path / "training_step.png").stat().st_size > 500


@pytest.mark.slow
def test_steps_of_language_models_run(tmp_path, monkeypatch, capsys):
    written = tmp_path / "lm.json"
    sizes = ["--vocab", 1500, "--tokens", 64, "--width", 16, "--repeats", 1]
    main(language_model, monkeypatch, *sizes, "--methods", "exact", "dis", "--json", written)
    records = json.loads(written.read_text())
    assert [(r["teacher"], r["method"]) for r in records] == [
        (teacher, method) for teacher in ("given", "online") for method in ("exact", "dis")
    ]
    assert all(0 < record["error"] < 0.1 for record in records if record["method"] == "dis")


@pytest.mark.slow
def test_errors_are_measured_of_glyphs(tmp_path, monkeypatch):
    """Of one layout with and without updates, and of what knows the student: that has the smallest error."""
    teacher = estimator_error.glyph_task.build_teacher(3375)
    teacher.save_pretrained(tmp_path)
    monkeypatch.setattr(estimator_error, "WARM_UP_BATCHES", 2)
    task = estimator_error.glyphs(argparse.Namespace(teacher=tmp_path))
    layout = (16, 64, 32, 4)
    methods = [
        estimator_error.Method("dis", "pps", *layout),
        estimator_error.Method("dis", "pps", *layout, 2),
        proposal_variants.Variant("oracle", "pps", *layout, knows="both"),
        proposal_variants.Variant("sketch", "pps", *layout, knows="both", rank=8),
        proposal_variants.Variant("started", "pps", *layout, memory="started and counted"),
    ]
    task = dataclasses.replace(task, steps=(0, 1), num_sampled=3, batch_size=16, measured_size=16, methods=methods)
    records = estimator_error.run(task)
    assert [record["step"] for record in records] == 5 * [0] + 5 * [1]
    all_update, some, oracle = records[5:8]
    assert (all_update["rows_touched"], some["rows_touched"]) == (512, 32)
    assert some["error_head"] > all_update["error_head"] and oracle["error"] < all_update["error"]
