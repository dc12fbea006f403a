"""Checkpoints: a resumed run is the uninterrupted one, and nothing of the teacher is in any file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import column_ids, images, labelled_images, resnet, vit

from hf_dis import SamplerSpec, VocabShard, make_sampler
from hf_dis.sampling import class_memory
from hf_dis.teacher.targets import TeacherTargets
from hf_dis.trainer import checkpoints

BUILDS = {
    "ViT": lambda **kw: vit(40, hidden_dropout_prob=0.1, **kw),  # dropout: the global generator has to continue too
    "ResNet": lambda **kw: resnet(40, **kw),
}
EVERY_OTHER = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


def state(trainer):
    sampler = {f"sampler.{name}": value for name, value in trainer.distiller.sampler.state_dict().items()}
    return {name: value.clone() for name, value in {**trainer.model.state_dict(), **sampler}.items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def checkpoint_of(trainer, step):
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


@pytest.mark.parametrize(
    "layout", [{}, {"num_shared_classes": 0, "design": "replacement"}], ids=["strata", "per item"]
)
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(make_trainer, build, layout):
    """Five steps of four in an epoch, stopped at step 2, resumed by a second process with a second student."""
    whole = make_trainer(build(), max_steps=5, head_learning_rate=3e-2, **EVERY_OTHER, **layout)
    whole.train()
    resumed = make_trainer(build(seed=7), max_steps=5, head_learning_rate=3e-2, **EVERY_OTHER, **layout)
    assert differing(state(whole), state(resumed)), "they are alike before: the test tests nothing"
    resumed.train(resume_from_checkpoint=str(checkpoint_of(whole, 2)))
    assert differing(state(whole), state(resumed)) == []

    def logs(trainer):
        return [
            {name: value for name, value in log.items() if name.startswith(("loss", "kd", "ce", "dis"))}
            for log in trainer.state.log_history
            if log["step"] > 2 and "loss" in log
        ]

    assert logs(resumed) == logs(whole) and len(logs(whole)) == 3


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_the_best_model_is_loaded_at_the_end(make_trainer, build):
    """The "best" is the largest loss, so that it is not the last; a ViT's file has other names than its modules."""
    trainer = make_trainer(
        build(),
        eval_dataset=labelled_images(16, 40),
        max_steps=4,
        **EVERY_OTHER | {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
        load_best_model_at_end=True,
        metric_for_best_model="eval_kl",
        greater_is_better=True,
    )
    trainer.train()
    measured = {log["step"]: log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log}
    best = max(measured, key=measured.get)
    assert best < 4 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_kl"] == pytest.approx(measured[best], rel=1e-6)
    assert measured[4] != pytest.approx(measured[best], rel=1e-3)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_files_hold_an_ordinary_student_and_nothing_of_the_teacher(make_trainer, build, tmp_path):
    teacher = build(seed=1, spread=30)
    trainer = make_trainer(build(), teacher, **EVERY_OTHER, probe_steps=1)
    trainer.train()
    trainer.save_model()
    build().save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    output = Path(trainer.args.output_dir)
    weights = list(output.rglob("model.safetensors"))
    assert len(weights) == 3  # of two checkpoints, and of the end
    for file in weights:
        saved = load_file(file)
        assert saved.keys() == plain.keys()
        assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in plain.items()}
    pieces = [p.detach().numpy().tobytes()[:64] for p in teacher.parameters() if p.dim() > 1]
    for file in (file for file in output.rglob("*") if file.is_file()):
        content = file.read_bytes()
        assert not any(piece in content for piece in pieces), file

    reloaded = type(trainer.model).from_pretrained(output)
    assert torch.equal(reloaded(images(4)).logits, trainer.model.eval()(images(4)).logits)


def test_save_only_model_keeps_no_state(make_trainer):
    trainer = make_trainer(max_steps=2, save_only_model=True, **EVERY_OTHER)
    trainer.train()
    assert not list(Path(trainer.args.output_dir).rglob("dis_state*"))


def test_resuming_with_accumulation(make_trainer):
    """The state is saved between optimizer steps, each of two samples."""
    keywords = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, **EVERY_OTHER}
    whole = make_trainer(**keywords)
    whole.train()
    resumed = make_trainer(vit(40, seed=7), **keywords)
    resumed.train(resume_from_checkpoint=str(checkpoint_of(whole, 2)))
    assert differing(state(whole), state(resumed)) == []


@pytest.mark.parametrize("shard", [None, VocabShard(0, 60)], ids=["whole", "sharded"])
def test_a_density_that_serves_several_steps_is_resumed(tmp_path, monkeypatch, shard):
    """Saved between two densities; also by a sampler whose classes are written into one file of all processes."""
    monkeypatch.setattr(class_memory, "CLASSES_PER_STEP", 20)
    spec, logits = SamplerSpec(num_sampled_classes=4, num_shared_classes=12, rank_depth=4), torch.randn(8, 60)

    def step(sampler):
        sample = sampler.sample([TeacherTargets(logits, 1.0, 4)])
        sampler.learn(sample, torch.ones_like(sample.log_weights))
        return column_ids(sample)

    whole, resumed = (make_sampler(60, spec, shard=shard) for _ in range(2))
    for _ in range(5):
        step(whole)
    checkpoints.save_sampler(whole, str(tmp_path))
    checkpoints.restore_sampler(resumed, str(tmp_path), processes=1, seed=0)
    for _ in range(4):
        assert torch.equal(step(whole), step(resumed))
