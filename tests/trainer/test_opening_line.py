"""The line at the start of a training: what it says, and where it is quiet."""

import pytest
from tiny_models import labelled_images, llama, vit
from transformers.utils import logging

from hf_dis import DISReportCallback, cache_teacher_targets
from hf_dis.autotune import TOKENS, HeadCosts
from hf_dis.estimate import estimate_head
from hf_dis.trainer.callbacks import OpeningLine, opening_line


def test_sampled_classes(make_trainer):
    trainer = make_trainer(exact_warmup_steps=2)
    trainer.add_callback(DISReportCallback(trainer))
    line = opening_line(trainer)
    assert line.startswith("hf_dis: 14 of 40 classes per item are sampled, of which 8 in 16 shared tails; ")
    assert "kernels: torch" in line and "the first 2 steps compute all classes" in line
    expected = estimate_head(8, 40, 16, 6, 8)
    speed = expected.blocks.seconds / expected.sampled.seconds
    assert f"a head step {speed:.2g} times as fast as with all classes (estimated for an NVIDIA A100 80GB); " in line
    sampled, exact = expected.sampled.memory, expected.blocks.memory
    assert f"of 8 items take {sampled / 1e6:.3g} MB in place of {exact / 1e6:.3g} MB (estimated)" in line
    assert line.endswith(f"report: {trainer.args.output_dir}/report/report.html") and "\n" not in line


def test_timed_speed(make_trainer):
    data = labelled_images(4, 30_000)
    student, teacher = (vit(30_000, seed=seed) for seed in (0, 1))
    trainer = make_trainer(student, teacher, train_dataset=data, head_mode="auto", num_sampled_classes=2)
    costs = trainer.distiller.costs
    assert costs is not None
    if trainer.distiller.mode == "sampled":  # as the clock decides
        ratio = f"{costs.exact / costs.sampled:.2g}"
        assert f"a head step {ratio} times as fast as with all classes (timed)" in opening_line(trainer)


def test_exact_distillation(make_trainer):
    assert "all 40 classes are computed" in opening_line(make_trainer(head_mode="exact"))
    assert "report:" not in opening_line(make_trainer(head_mode="exact"))
    assert "times as fast" not in opening_line(make_trainer(head_mode="exact"))


def test_exact_distillation_by_the_clock(make_trainer, monkeypatch):
    monkeypatch.setattr("hf_dis.build.measure_costs", lambda *args, **layout: HeadCosts(1.0, 2.0))
    line = opening_line(make_trainer(head_mode="auto"))
    assert line.startswith(f"hf_dis: all 40 classes are computed (exact distillation; timed: {HeadCosts(1.0, 2.0)}); ")


def test_for_items_that_are_not_known_a_usual_number_is_taken(make_trainer):
    class Endless:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise AssertionError

    trainer = make_trainer(llama(40), llama(40, seed=1), train_dataset=Endless())
    assert f"logits and loss of {TOKENS:,} items" in opening_line(trainer)


def test_stored_targets_are_not_ranked(make_trainer, tmp_path):
    teacher = vit(40, seed=1, spread=30)
    cache = cache_teacher_targets(teacher, labelled_images(32, 40), tmp_path / "cache", show_progress=False)
    trainer = make_trainer(teacher_cache=cache, num_shared_classes=0, rank_depth=None)
    sizes = 8, 40, 16, trainer.distiller.sampler.columns, 0
    expected = estimate_head(*sizes, ranks_teacher=False).sampled.memory
    assert f"of 8 items take {expected / 1e6:.3g} MB" in opening_line(trainer)
    assert expected < estimate_head(*sizes).sampled.memory


@pytest.mark.parametrize(
    ("settings", "on_stderr", "logged"),
    [
        ({"disable_tqdm": False}, 1, 0),
        ({"disable_tqdm": False, "log_level": "error"}, 0, 0),
        ({"disable_tqdm": True}, 0, 1),
    ],
    ids=["bar", "errors only", "no bar"],
)
def test_where_the_line_goes(make_trainer, capsys, caplog, settings, on_stderr, logged):
    caplog.set_level(logging.INFO, logger="hf_dis")
    before = logging.get_verbosity()
    try:
        make_trainer(max_steps=1, **settings).train()
    finally:
        logging.set_verbosity(before)
    assert capsys.readouterr().err.count("hf_dis: 14 of 40") == on_stderr
    assert [record.levelname for record in caplog.records if "14 of 40" in record.message] == ["INFO"] * logged


def test_other_processes_are_quiet(make_trainer, capsys):
    trainer = make_trainer(max_steps=1, disable_tqdm=False)
    (opening,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, OpeningLine))
    trainer.state.is_world_process_zero = False
    opening.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert "hf_dis:" not in capsys.readouterr().err
