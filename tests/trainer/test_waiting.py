"""Lines where one has to wait: the timing at set-up, and a first step that compiles."""

import pytest
from tiny_models import labelled_images
from transformers import TrainerControl, TrainerState
from transformers.utils import logging

from hf_dis.autotune import HeadCosts
from hf_dis.trainer import progress
from hf_dis.trainer.progress import FirstStep, tell


@pytest.fixture(autouse=True)
def verbosity():
    """The level at the start of a process, which the lines depend on."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.setattr("hf_dis.build.measure_costs", lambda *args, **options: HeadCosts(2.0, 1.0))


def test_the_timing_is_announced(make_trainer, costs, capsys):
    make_trainer(head_mode="auto", disable_tqdm=False)
    assert "hf_dis: head_mode='auto' compares all classes with sampled classes on cpu" in capsys.readouterr().err
    make_trainer(head_mode="sampled", disable_tqdm=False)
    make_trainer(head_mode="auto", disable_tqdm=True)
    assert "compares" not in capsys.readouterr().err


@pytest.mark.parametrize(("compiled", "lines"), [(False, 0), (True, 2)])
def test_a_first_step_that_compiles_is_announced_once(make_trainer, monkeypatch, capsys, compiled, lines):
    monkeypatch.setattr(progress, "uses_triton", lambda device: compiled)
    args, state, control = make_trainer(disable_tqdm=False).args, TrainerState(), TrainerControl()
    callback = FirstStep()
    for _ in range(2):  # a second training announces its own
        callback.on_train_begin(args, state, control)
        for _ in range(2):
            callback.on_step_begin(args, state, control)
            callback.on_step_end(args, state, control)
        told = capsys.readouterr().err
        assert told.count("hf_dis: the first step") == lines
        assert ("compiles kernels ..." in told and "took 0.0 seconds" in told) == compiled


def test_other_processes_are_quiet(make_trainer, monkeypatch, capsys):
    args = make_trainer(disable_tqdm=False).args
    tell(args, "a line")
    assert "a line" in capsys.readouterr().err
    monkeypatch.setattr(type(args), "process_index", 1)
    tell(args, "a line")
    assert "a line" not in capsys.readouterr().err


def test_errors_only(make_trainer, capsys):
    tell(make_trainer(disable_tqdm=False, log_level="error").args, "a line")
    assert "a line" not in capsys.readouterr().err


def test_an_evaluation_has_its_bar(make_trainer, capsys):
    make_trainer(disable_tqdm=False, eval_dataset=labelled_images(24, 40)).evaluate()
    assert "3/3" in capsys.readouterr().err
