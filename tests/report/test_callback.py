"""The report of a training: its files and times, its records, and the numbers that loggers get without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo_server import ROOT, interpreter
from tiny_models import labelled_images, vit

import hf_dis.report
from hf_dis import DISReportCallback
from hf_dis.report.clock import PARTS
from hf_dis.report.command import make_report
from hf_dis.report.records import read, read_run


def folder_of(trainer):
    return Path(trainer.args.output_dir) / "report"


def page_of(trainer):
    return (folder_of(trainer) / "report.html").read_text()


def reporting(make_trainer, student=None, **keywords):
    settings = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "probe_steps": 1}
    trainer = make_trainer(student, eval_dataset=labelled_images(8, 40), **settings | keywords)
    trainer.add_callback(DISReportCallback(trainer))
    return trainer


# Files


def test_a_page_at_every_evaluation_and_at_the_end(make_trainer):
    trainer, seen = reporting(make_trainer, max_steps=4), []
    callback = trainer.callback_handler.callbacks[-1]
    write = callback.write

    def watched(folder, name):
        write(folder, name)
        seen.append((trainer.state.global_step, (folder / "report.html").read_text()))

    callback.write = watched
    trainer.train()
    assert [step for step, _ in seen] == [2, 4, 4]
    assert ["No end is recorded" in page for _, page in seen] == [True, True, False]
    assert {file.name for file in folder_of(trainer).iterdir()} == {"report.html", "records.jsonl"}
    last = [log for log in trainer.state.log_history if "dis/ess" in log][-1]
    cells = f"<td><code>dis/ess</code></td><td>{last['dis/ess']:.6g}</td><td>4</td>"
    assert last["step"] == 4 and cells in page_of(trainer) and "Ended after step 4 of 4" in page_of(trainer)


def test_the_page_has_its_figures_the_command_and_the_versions(make_trainer):
    trainer = reporting(make_trainer, max_steps=4)
    trainer.train()
    page = page_of(trainer)
    for title in (
        "Training loss",
        "KL to the teacher",
        "Gradient error",
        "Student logits per item",
        "Class coverage",
        "Proposal and signal",
        "Time of a step",
    ):
        assert title in page
    assert sys.orig_argv[-1] in page and f"torch {torch.__version__.partition('+')[0]}" in page
    assert "<td><code>num_sampled_classes</code></td><td>6</td>" in page


def test_records_hold_every_log_the_proposal_and_the_times(make_trainer):
    trainer = reporting(make_trainer, max_steps=4, exact_warmup_steps=2)
    trainer.train()
    run = read_run(trainer.args.output_dir)
    logged = [{name: log[name] for name in log if name != "logits_per_item"} for log in run.logs]
    expected = [{name: log[name] for name in log if name != "total_flos"} for log in trainer.state.log_history]
    assert logged == expected and run.has_ended  # total_flos is taken out by a callback of transformers
    assert [log["logits_per_item"] for log in run.logs if "loss" in log] == [40, 40, 14, 14]
    assert [shot["step"] for shot in run.proposals] == [1, 2, 3, 4]
    ranks = trainer.distiller.sampler.proposal.ranks
    sizes = ranks.edges.diff()
    for name in ("measured", "fitted"):
        assert sum(torch.tensor(run.proposals[-1][name]) * sizes) == pytest.approx(1, rel=2e-3)
    fitted = torch.cat([part.mean()[None] for part in ranks.density(10).split(sizes.tolist())])
    assert run.proposals[-1]["fitted"] == pytest.approx(fitted.tolist(), rel=1e-3)
    assert set(run.seconds) == set(PARTS) and all(seconds > 0 for seconds in run.seconds.values())


def test_the_page_of_a_run_that_died_is_made_from_its_records(make_trainer):
    trainer = reporting(make_trainer, max_steps=8, eval_steps=100)
    step = trainer.training_step

    def dies(*args, **keywords):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(*args, **keywords)

    trainer.training_step = dies
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with (folder_of(trainer) / "records.jsonl").open("a") as file:
        file.write('{"kind": "lo')  # the last line was cut short
    assert not (folder_of(trainer) / "report.html").exists()
    page = make_report([trainer.args.output_dir]).read_text()
    assert "No end is recorded" in page and "step 3 of 8" in page
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks


def test_a_resumed_training_continues_its_records(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "max_steps": 4}
    first = reporting(make_trainer, **settings)
    first.train()
    second = reporting(make_trainer, **settings)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-2"))
    steps = [log["step"] for log in read_run(second.args.output_dir).logs if "kd_loss" in log]
    assert steps == [1, 2, 3, 4]
    kinds = [one["kind"] for one in read(folder_of(second) / "records.jsonl")]
    assert kinds.count("run") == 2 and kinds.count("end") == 1


def test_another_training_replaces_the_records(make_trainer):
    for _ in range(2):
        trainer = reporting(make_trainer, max_steps=2)
        trainer.train()
    assert [log["step"] for log in read_run(trainer.args.output_dir).logs if "kd_loss" in log] == [1, 2]


def test_accumulated_batches_are_one_step_of_the_clock(make_trainer):
    trainer = reporting(make_trainer, max_steps=3, gradient_accumulation_steps=2)
    clock_steps = []
    callback = trainer.callback_handler.callbacks[-1]
    callback.on_train_end = lambda *args, **keywords: clock_steps.append(callback._clock.steps)
    trainer.train()
    assert clock_steps == [1]


@pytest.mark.parametrize(
    "settings", [{"head_mode": "exact"}, {"proposal": "teacher"}], ids=["exact", "fixed proposal"]
)
def test_a_part_without_values_is_left_out(make_trainer, settings):
    trainer = reporting(make_trainer, probe_steps=0, max_steps=2, **settings)
    trainer.train()
    page = page_of(trainer)
    assert "Training loss" in page and "Gradient direction" not in page and "Proposal and signal" not in page
    for title in ("Class coverage", "Gradient error"):  # the error is estimated from the sample too
        assert (title in page) == ("proposal" in settings)


def test_an_evaluation_before_training_is_reported(make_trainer):
    trainer = reporting(make_trainer)
    trainer.evaluate()
    assert "Evaluated without training" in page_of(trainer) and "eval_kl" in page_of(trainer)


def test_only_the_main_process_writes(make_trainer, monkeypatch):
    trainer = reporting(make_trainer, max_steps=1)
    monkeypatch.setattr(type(trainer.state), "is_world_process_zero", property(lambda _: False, lambda *_: None))
    trainer.train()
    assert not folder_of(trainer).exists()


def test_metrics_that_are_no_numbers_are_shown_and_training_goes_on(make_trainer):
    metrics = {"per_class": [0.25, 0.5], "note": "a <b>\nc", "none": None, "nested": {"x": [1]}, "all": True}
    trainer = reporting(make_trainer, max_steps=4, compute_metrics=lambda _: dict(metrics))
    trainer.train()
    assert trainer.state.global_step == 4
    page = page_of(trainer)
    shown = {"per_class": "[0.25, 0.5]", "note": "a &lt;b&gt; c", "none": "None", "all": "True"}
    for name, text in shown.items():
        assert f"<td><code>eval_{name}</code></td><td>{text}</td><td>4</td>" in page


def test_a_secret_of_the_command_is_hidden(make_trainer, monkeypatch):
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "run.py", "--hub_token", "hf_abc", "--api-key=xyz", "--seed", "1"]
    )
    trainer = reporting(make_trainer, max_steps=2)
    trainer.train()
    written = page_of(trainer) + (folder_of(trainer) / "records.jsonl").read_text()
    assert "hf_abc" not in written and "xyz" not in written and "--seed 1" in written


def test_diverged_values_are_recorded_and_told(make_trainer):
    student = vit(40)
    trainer = reporting(
        make_trainer, student, max_steps=2, probe_steps=0, compute_metrics=lambda _: {"x": float("inf")}
    )
    trainer.train()
    assert "eval_x is inf: training has diverged" in page_of(trainer)
    assert json.loads((folder_of(trainer) / "records.jsonl").read_text().splitlines()[0])["kind"] == "run"


def test_without_matplotlib_it_says_what_to_install(make_trainer, monkeypatch):
    trainer = make_trainer()
    for name in ("page", "figures"):
        monkeypatch.delitem(sys.modules, f"hf_dis.report.{name}", raising=False)
        monkeypatch.delattr(hf_dis.report, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install 'matplotlib"):
        DISReportCallback(trainer)


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


@pytest.mark.slow
def test_trackio_gets_every_scalar_beside_gradio():
    """Runs the test above in the environment of the demo: Trackio needs Gradio."""
    command = [interpreter(), "-m", "pytest", "-q", "-k", test_trackio_gets_every_scalar.__name__, __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "-m", "not slow"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "1 passed" in done.stdout, f"install trackio beside gradio: {done.stdout[-2000:]}"
