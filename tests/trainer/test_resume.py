"""Interrupted runs: killed at any moment, resumed from what is whole, by the same run or by a new one."""

import logging
import random
import shutil
import subprocess
import sys

import kill_worker
import pytest
from safetensors.torch import load_file, save_file
from test_checkpoints import EVERY_OTHER, differing, state
from tiny_models import vit

from hf_dis.trainer import checkpoints
from hf_dis.trainer.manifest import LAST_FILE, MANIFEST, read_manifest

FILES = [
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "dis_state_0.safetensors",
    "training_args.bin",
    LAST_FILE,
    MANIFEST,
]


def messages(caplog, train):
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        train()
    return [record.message for record in caplog.records if record.name.startswith("hf_dis")]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The output of a run of 6 steps with checkpoints at 2, 4 and 6, and how it ended."""
    folder = tmp_path_factory.mktemp("interrupted")
    whole = kill_worker.trainer(folder, save_steps=2)
    whole.train()
    return folder, state(whole)


@pytest.fixture
def output_dir(interrupted, tmp_path):
    """A copy whose last checkpoint, 6, is gone."""
    shutil.copytree(interrupted[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    return tmp_path / "out"


def test_the_files_of_a_checkpoint_are_those_tested(output_dir):
    assert sorted(path.name for path in (output_dir / "checkpoint-4").iterdir()) == sorted(FILES)
    listed = read_manifest(output_dir / "checkpoint-4")["files"]
    assert sorted([*listed, LAST_FILE, MANIFEST]) == sorted(FILES)


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_the_last_whole_checkpoint_is_resumed_from_and_the_torn_one_named(
    interrupted, output_dir, name, damage, caplog
):
    torn = output_dir / "checkpoint-4" / name
    if damage == "cut":
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    else:
        torn.unlink()
    trainer = kill_worker.trainer(output_dir, student=7, save_steps=2)
    with pytest.raises(ValueError, match=rf"checkpoint-4 cannot be resumed from: {name}.*resume from .*checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-4"))
    (warning,) = messages(caplog, lambda: trainer.train(resume_from_checkpoint=True))
    assert "checkpoint-4 is torn" in warning and name in warning and "Resuming from" in warning
    assert "checkpoint-2" in warning
    assert differing(state(trainer), interrupted[1]) == []


def test_whole_checkpoints_are_resumed_from_silently(interrupted, output_dir, caplog):
    trainer = kill_worker.trainer(output_dir, student=7, save_steps=2)
    assert messages(caplog, lambda: trainer.train(resume_from_checkpoint=True)) == []
    assert trainer._initial_global_step == 4
    assert differing(state(trainer), interrupted[1]) == []


def test_with_nothing_whole_it_is_refused(make_trainer):
    with pytest.raises(ValueError, match="no folder checkpoint-<step>"):
        make_trainer().train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_trainer_is_taken_with_a_warning(output_dir, caplog):
    """A checkpoint with the files of Trainer, and without those of hf_dis."""
    for name in (MANIFEST, "dis_state_0.safetensors"):
        (output_dir / "checkpoint-4" / name).unlink()
    trainer = kill_worker.trainer(output_dir, save_steps=2)
    (warning,) = messages(caplog, lambda: trainer.train(resume_from_checkpoint=True))
    assert f"checkpoint-4 has no {MANIFEST}" in warning and "start again" in warning
    assert trainer.state.global_step == 6


# Another set-up than the one that was interrupted

CHANGES = {
    "temperature": (2.0, 3.0),
    "hard_label_weight": (0.1, 0.5),
    "num_sampled_classes": (6, 5),
    "proposal_floor": (0.05, 0.2),
    "head_learning_rate": (0.1, 0.5),
    "design": ("replacement", "pps"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_told_with_both_values(make_trainer, caplog, name):
    before, after = CHANGES[name]
    layout = {"num_shared_classes": 0, **EVERY_OTHER}
    make_trainer(max_steps=2, **layout, **{name: before}).train()
    trainer = make_trainer(max_steps=3, **layout, **{name: after})
    (warning,) = messages(caplog, lambda: trainer.train(resume_from_checkpoint=True))
    assert warning.startswith(f"{name} was {before!r} ") and f"is {after!r} now" in warning
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert "continues with the former" in warning if name == "head_learning_rate" else "the latter" in warning
    assert 0.5 not in rates


@pytest.mark.parametrize(("name", "after"), [("head_learning_rate", 0.5), ("row_sparse_head", True)])
def test_another_optimizer_is_refused(make_trainer, name, after):
    before = make_trainer(max_steps=2, **EVERY_OTHER)
    before.train()
    trainer = make_trainer(max_steps=3, **EVERY_OTHER, **{name: after})
    with pytest.raises(
        ValueError, match=rf"{name} was {getattr(before.args, name)} .*is {after} now.*set it as it was"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_that_had_ended_is_not_trained_further(make_trainer):
    ended = make_trainer(max_steps=3, save_strategy="steps", save_steps=3)
    ended.train()
    trainer = make_trainer(vit(40, seed=7), max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and differing(state(trainer), state(ended)) == []


def test_another_proposal_starts_anew_and_the_samples_go_on(make_trainer, caplog):
    whole = make_trainer(max_steps=2, **EVERY_OTHER)
    whole.train()
    trainer = make_trainer(max_steps=2, proposal="teacher", **EVERY_OTHER)  # it had ended: only the state is loaded
    changed, restarts = messages(caplog, lambda: trainer.train(resume_from_checkpoint=True))
    assert "proposal was 'dis' when" in changed and "is 'teacher' now" in changed
    assert "the proposal starts again" in restarts and "rank_weights" in restarts
    assert trainer.distiller.sampler.generator.get_state().equal(whole.distiller.sampler.generator.get_state())


def test_another_teacher_is_told_by_its_fingerprint(make_trainer, caplog):
    one, other = vit(40, seed=1, spread=30), vit(40, seed=2, spread=30)
    first = make_trainer(teacher=one, max_steps=2, **EVERY_OTHER)
    first.train()
    trainer = make_trainer(teacher=other, max_steps=3, **EVERY_OTHER)
    (warning,) = messages(caplog, lambda: trainer.train(resume_from_checkpoint=True))
    assert warning.startswith("teacher_model was a different one")
    assert first.distiller.teacher.fingerprint in warning and trainer.distiller.teacher.fingerprint in warning


def test_other_numbers_of_processes_share_the_proposal(output_dir, caplog):
    """As if two processes had saved it: the first continues with its own samples, and reports the second."""
    checkpoint = output_dir / "checkpoint-4"
    manifest = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(manifest.replace('"processes": 1', '"processes": 2'))
    trainer = kill_worker.trainer(output_dir, save_steps=2)
    (warning,) = messages(caplog, lambda: trainer.train(resume_from_checkpoint=True))
    assert "saved by 2 processes and is resumed by 1" in warning


def test_other_numbers_of_examples_in_a_step_are_told(output_dir, caplog):
    trainer = kill_worker.trainer(output_dir, gradient_accumulation_steps=3, save_steps=2)
    (warning,) = messages(caplog, lambda: trainer.train(resume_from_checkpoint=True))
    assert "had 8 examples when" in warning and "has 12 now" in warning and "gradient_accumulation_steps" in warning


def test_a_process_that_is_new_samples_from_its_own_seed(output_dir, monkeypatch):
    """One more process than saved: the proposal of the first, and a generator that no earlier process has."""
    checkpoint = output_dir / "checkpoint-4"
    saved = load_file(checkpoint / "dis_state_0.safetensors")
    save_file({name: value + 1 for name, value in saved.items()}, checkpoint / "dis_state_1.safetensors")  # stale
    trainer = kill_worker.trainer(output_dir)
    sampler = trainer.distiller.sampler
    monkeypatch.setattr(checkpoints, "process_index", lambda: 1)
    for _ in range(2):
        checkpoints.restore_sampler(sampler, str(checkpoint), processes=1, seed=trainer.args.seed)
        restored = sampler.state_dict()
        fresh = kill_worker.trainer(output_dir, seed=trainer.args.seed + 1).distiller.sampler.generator
        assert restored.pop("generator").equal(fresh.get_state())
        assert [name for name, value in restored.items() if not value.equal(saved[name])] == []
        sampler.generator.manual_seed(5)


# kill -9


def assert_nothing_is_lost(tmp_path, delays):
    finished = subprocess.run(
        [sys.executable, kill_worker.__file__, str(tmp_path / "killed"), *(f"{delay:.4f}" for delay in delays)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("killed") == len(delays)
    whole = kill_worker.trainer(tmp_path / "whole", **kill_worker.LONG)
    whole.train()
    assert differing(load_file(tmp_path / "killed" / "end.safetensors"), state(whole)) == []
    return finished.stdout


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    assert_nothing_is_lost(tmp_path, [0.0, 0.01, 0.02])


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    """A step and its checkpoint take some 20 ms here, most of it for the checkpoint: many are torn."""
    moments = random.Random(0)
    told = assert_nothing_is_lost(tmp_path, [moments.uniform(0, 0.06) for _ in range(20)])
    assert "torn: ['checkpoint" in told
