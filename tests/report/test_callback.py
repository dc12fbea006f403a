"""The report: its files and times, its advice, and the numbers that loggers get without it."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import labelled_images

import hf_dis.report
from hf_dis import DISReportCallback
from hf_dis.report.callback import advice, report

GOOD = {
    "kd_loss": 0.5,
    "dis/coverage": 0.9,
    "dis/ess": 40.0,
    "dis/certain": 0.5,
    "probe/exact_kd_loss": 0.5,
    "probe/sampled_kd_loss": 0.45,
    "probe/cosine": 0.95,
    "probe/relative_error": 0.3,
}


def files_of(trainer):
    return {file.name for file in (Path(trainer.args.output_dir) / "report").glob("*")}


def reporting(make_trainer, **keywords):
    settings = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "probe_steps": 1}
    trainer = make_trainer(eval_dataset=labelled_images(8, 40), **settings | keywords)
    trainer.add_callback(DISReportCallback(trainer))
    return trainer


# Files


def test_a_report_at_every_evaluation_and_at_the_end(make_trainer):
    trainer, seen = reporting(make_trainer, max_steps=4), []
    callback = trainer.callback_handler.callbacks[-1]
    write = callback.write
    callback.write = lambda folder, state: (write(folder, state), seen.append((state.global_step, files_of(trainer))))
    trainer.train()
    assert [step for step, _ in seen] == [2, 4, 4]
    expected = {"report.md", "losses.png", "sample.png", "probe.png", "proposal.png"}
    assert all(files == expected for _, files in seen)
    folder = Path(trainer.args.output_dir) / "report"
    page = (folder / "report.md").read_text()
    for name in expected - {"report.md"}:
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in page
    last = [log for log in trainer.state.log_history if "dis/ess" in log][-1]
    assert last["step"] == 4 and f"| `dis/ess` | {last['dis/ess']:.6g} | 4 |" in page


def test_the_proposal_is_shown_at_the_first_report_and_now(make_trainer, monkeypatch):
    trainer, shown = reporting(make_trainer, max_steps=4), []
    callback = trainer.callback_handler.callbacks[-1]
    monkeypatch.setattr(callback.plots, "plot_proposal", lambda path, snapshots: shown.append(snapshots))
    trainer.train()
    assert [[shot.step for shot in shots] for shots in shown] == [[2], [2, 4], [2, 4]]
    ranks = trainer.distiller.sampler.proposal.ranks
    assert shown[-1][1].measured.tolist() == ranks.profile().tolist()
    assert shown[-1][1].fitted.tolist() == ranks.density(10).tolist() != shown[-1][0].fitted.tolist()


@pytest.mark.parametrize(
    "settings",
    [{"head_mode": "exact"}, {"proposal": "teacher"}],
    ids=["exact", "fixed proposal"],
)
def test_what_there_is_not_is_not_plotted(make_trainer, settings):
    trainer = reporting(make_trainer, probe_steps=0, max_steps=2, **settings)
    trainer.train()
    expected = {"report.md", "losses.png"} | ({"sample.png"} if "proposal" in settings else set())
    assert files_of(trainer) == expected


def test_an_evaluation_before_training_is_reported(make_trainer):
    trainer = reporting(make_trainer)
    trainer.evaluate()
    assert files_of(trainer) == {"report.md", "losses.png"}


def test_only_the_main_process_writes(make_trainer):
    trainer = reporting(make_trainer)
    callback, folder = trainer.callback_handler.callbacks[-1], Path(trainer.args.output_dir) / "report"
    callback.write(folder, replace(trainer.state, is_world_process_zero=False))
    assert not folder.exists()


def test_metrics_that_are_no_numbers_are_shown_and_training_goes_on(make_trainer):
    metrics = {"per_class": [0.25, 0.5], "note": "a | b\nc", "none": None, "nested": {"x": [1]}, "all": True}
    trainer = reporting(make_trainer, max_steps=4, compute_metrics=lambda _: dict(metrics))
    trainer.train()
    assert trainer.state.global_step == 4
    page = (Path(trainer.args.output_dir) / "report" / "report.md").read_text()
    shown = {"per_class": "[0.25, 0.5]", "note": "a \\| b c", "none": "None", "nested": "{'x': [1]}", "all": "True"}
    for name, text in shown.items():
        assert f"| `eval_{name}` | {text} | 4 |" in page


def test_a_long_metric_is_cut_and_a_number_is_not():
    page = report([{"matrix": [[0] * 1000] * 1000, "large": 2.0**200, "loss": np.float32(0.123456789), "step": 1}], [])
    (line,) = [line for line in page.splitlines() if "`matrix`" in line]
    assert line.startswith("| `matrix` | [[0, 0,") and line.endswith(" ... | 1 |") and len(line) < 300
    assert "| `large` | 1.60694e+60 | 1 |" in page and "| `loss` | 0.123457 | 1 |" in page


def test_without_matplotlib_it_says_what_to_install(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.delitem(sys.modules, "hf_dis.report.plots", raising=False)
    monkeypatch.delattr(hf_dis.report, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install 'matplotlib"):
        DISReportCallback(trainer)


# Advice


def test_good_values_need_no_advice():
    assert advice(GOOD) == advice({}) == []
    assert "Nothing stands out." in report([{**GOOD, "step": 7}], [])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dis/coverage": 0.41, "probe/relative_error": 1.2}, ["coverage 0.41", "relative error 1.20"]),
        ({"dis/ess": 9.5}, ["effective sample size 9.5"]),
        ({"probe/relative_error": 1.01}, ["relative error 1.01"]),
        ({"probe/sampled_kd_loss": 0.37}, ["sampled loss 0.37"]),
        ({"probe/sampled_kd_loss": 0.63}, ["sampled loss 0.63"]),
        ({"kd_loss": -0.01}, ["below zero"]),
        ({"loss": float("nan")}, ["loss is nan: training has diverged"]),
    ],
    ids=["coverage", "ess", "gradient", "loss too low", "loss too high", "negative", "diverged"],
)
def test_bad_values_are_told(values, said):
    told = advice(GOOD | values)
    assert len(told) == len(said)
    assert all(text in line for text, line in zip(said, told, strict=True))


@pytest.mark.parametrize(
    "values",
    [
        {"dis/coverage": 0.5},
        {"dis/coverage": 0.1},  # with a good gradient
        {"dis/ess": 10.0},
        {"probe/relative_error": 1.0},
        {"probe/sampled_kd_loss": 0.375},
    ],
    ids=["coverage", "coverage, good gradient", "ess", "gradient", "loss"],
)
def test_values_at_their_thresholds_are_not_told(values):
    assert advice(GOOD | values) == []


def test_coverage_that_nothing_was_compared_with_asks_for_a_probe():
    (line,) = advice({"dis/coverage": 0.41, "dis/certain": 0.5})
    assert "num_shared_classes" in line and "probe_steps" in line
    (line,) = advice({"dis/coverage": 0.41, "dis/certain": 0.95})
    assert "Raise num_sampled_classes;" in line


# Loggers


def test_tensorboard_gets_every_scalar(make_trainer, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "probe_steps": 1, "logging_steps": 1, "max_steps": 2}
    trainer = make_trainer(report_to="tensorboard", eval_dataset=labelled_images(8, 40), **settings)
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    for log in trainer.state.log_history[:3]:
        for name, value in log.items():
            if name in ("kd_loss", "ce_loss", "eval_kl") or name.startswith(("dis/", "probe/")):
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                written = {event.step: event.value for event in events.Scalars(tag)}
                assert written[log["step"]] == pytest.approx(value, rel=1e-5), tag
    assert {"train/dis/coverage", "train/probe/cosine", "train/kd_loss", "eval/kl"} <= set(events.Tags()["scalars"])


def test_trackio_gets_every_scalar(make_trainer, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    logged = []
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setattr(trackio, "log", lambda values, *args, **kwargs: logged.append(values))
    make_trainer(report_to="trackio", logging_steps=1, max_steps=1).train()
    assert any("train/dis/coverage" in values for values in logged)
