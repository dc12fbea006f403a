"""Every divergence through the Trainer: training on all classes and on samples, evaluation, and what is refused."""

import pytest
import torch
from divergences_by_definition import OTHERS, definition
from tiny_models import assert_near, labelled_images, vit
from transformers import default_data_collator

from hf_dis import DISArguments, build_distiller, cache_teacher_targets

CLASSES, ITEMS = 40, 20
CHOICES = {
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd 0.1": {"divergence": "jsd", "jsd_beta": 0.1},
    "skew_kl 0.1": {"divergence": "skew_kl"},
}
CHOSEN = [(OTHERS[name], settings) for name, settings in CHOICES.items()]


def teacher_model():
    return vit(CLASSES, seed=1, spread=30)


def logits_of(model, items):
    with torch.no_grad():
        return model.eval()(torch.stack([item["pixel_values"] for item in items])).logits


@pytest.mark.parametrize("mode", ["sampled", "exact"])
@pytest.mark.parametrize("scales", [True, False], ids=["scaled", "not scaled"])
@pytest.mark.parametrize(("divergence", "settings"), CHOSEN, ids=CHOICES)
def test_evaluation_is_the_dense_mean_over_items(make_trainer, divergence, settings, scales, mode, dense_kd):
    student, teacher, items = vit(CLASSES), teacher_model(), labelled_images(ITEMS, CLASSES, seed=5)
    settings = {**settings, "scale_by_temperature": scales, "hard_label_weight": 0.0, "head_mode": mode}
    metrics = make_trainer(student, teacher, eval_dataset=items, temperature=3.0, **settings).evaluate()
    logits, target = logits_of(student, items), logits_of(teacher, items)
    kd = definition(divergence, logits, target, 3.0).mean() / (1 if scales else 9)
    expected = {
        "eval_loss": kd,
        "eval_kd_loss": kd,
        "eval_kl": dense_kd(logits, target, 1.0).mean(),
        f"eval_{divergence.name}": definition(divergence, logits, target, 1.0).mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-4), name


def test_at_temperature_one_the_loss_of_evaluation_is_the_divergence(make_trainer):
    settings = {"divergence": "reverse_kl", "temperature": 1.0, "eval_dataset": labelled_images(8, CLASSES)}
    metrics = make_trainer(**settings).evaluate()
    assert metrics["eval_reverse_kl"] == metrics["eval_kd_loss"] != metrics["eval_kl"]


@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize(("divergence", "settings"), CHOSEN, ids=CHOICES)
def test_a_step_on_all_classes_has_the_gradient_of_the_definition(divergence, settings, labelled, dense_ce):
    student, teacher = vit(CLASSES).train(), teacher_model()
    batch = default_data_collator(labelled_images(8, CLASSES))
    labels = batch["labels"] if labelled else batch.pop("labels") * 0
    distiller = build_distiller(student, teacher, DISArguments(head_mode="exact", hard_label_weight=0.3, **settings))
    with distiller.step(batch) as step:
        loss, terms = step.loss(student(**step.inputs))
        loss.mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    with torch.no_grad():
        target = teacher(batch["pixel_values"]).logits
    logits = student(batch["pixel_values"]).logits
    kd = definition(divergence, logits, target, 2.0)
    expected = 0.7 * kd + 0.3 * dense_ce(logits, labels) if labelled else kd
    expected.mean().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(terms["kd_loss"], kd, rtol=1e-4, atol=1e-5, check_dtype=False)
    assert_near(found, {name: parameter.grad for name, parameter in student.named_parameters()}, tolerance=1e-4)


@pytest.mark.parametrize(("divergence", "settings"), CHOSEN, ids=CHOICES)
def test_a_warm_up_without_end_is_exact_distillation(make_trainer, divergence, settings):
    calm = {"adam_epsilon": 1e-3, "logging_steps": 1}
    exact = make_trainer(vit(CLASSES), head_mode="exact", **calm, **settings)
    warm = make_trainer(vit(CLASSES), exact_warmup_steps=4, **calm, **settings)
    for trainer in (exact, warm):
        trainer.train()
    assert_near(warm.model.state_dict(), exact.model.state_dict(), tolerance=2e-6)


@pytest.mark.parametrize(("divergence", "settings"), CHOSEN, ids=CHOICES)
def test_a_student_gets_nearer_on_sampled_classes(make_trainer, divergence, settings):
    """The proposal learns from the signal of the divergence, and the probe compares with the exact one."""
    items = labelled_images(64, CLASSES)
    trainer = make_trainer(
        teacher=teacher_model(),
        train_dataset=items,
        eval_dataset=items,
        max_steps=40,
        hard_label_weight=0.0,
        num_sampled_classes=12,
        rank_depth=24,
        num_shared_classes=12,
        logging_steps=20,
        probe_steps=20,
        **settings,
    )
    before = trainer.evaluate()[f"eval_{divergence.name}"]
    trainer.train()
    assert trainer.evaluate()[f"eval_{divergence.name}"] < 0.7 * before
    probed = [log for log in trainer.state.log_history if "probe/cosine" in log]
    assert probed and all(log["probe/sampled_kd_loss"] >= 0 for log in probed)


@pytest.mark.parametrize("kind", ["teacher_cache", "eval_teacher_cache"])
@pytest.mark.parametrize("settings", CHOICES.values(), ids=CHOICES)
def test_a_cache_is_refused(settings, kind, tmp_path):
    teacher = teacher_model()
    cache = cache_teacher_targets(teacher, labelled_images(8, CLASSES), tmp_path / "cache", depth=4, sample_size=5)
    name = settings["divergence"]
    expected = rf"divergence is '{name}'.*every class.*Pass a teacher.*divergence='forward_kl'"
    with pytest.raises(ValueError, match=expected):
        build_distiller(vit(CLASSES), teacher, DISArguments(**settings), **{kind: cache})


def test_a_cache_serves_the_forward_kl_without_the_scale(tmp_path):
    teacher, batch = teacher_model(), default_data_collator(labelled_images(8, CLASSES))
    cache = cache_teacher_targets(
        teacher, labelled_images(8, CLASSES), tmp_path / "cache", depth=CLASSES, sample_size=0, temperature=3.0
    )
    items = cache.collator(default_data_collator)(labelled_images(8, CLASSES))
    losses = []
    for scales in (True, False):
        settings = DISArguments(head_mode="exact", temperature=3.0, hard_label_weight=0.0, scale_by_temperature=scales)
        student = vit(CLASSES).train()
        distiller = build_distiller(student, None, settings, teacher_cache=cache)
        with distiller.step(items) as step:
            losses.append(step.loss(student(**step.inputs))[0].detach())
    torch.testing.assert_close(losses[0], 9 * losses[1])
    assert len(batch["labels"]) == len(losses[0])


@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_the_reverse_kl_refuses_a_teacher_that_masks_classes(make_trainer, mode):
    teacher = teacher_model()
    with torch.no_grad():
        teacher.classifier.bias[3] = -torch.inf
    trainer = make_trainer(teacher=teacher, divergence="reverse_kl", head_mode=mode)
    with pytest.raises(ValueError, match=r"masks classes in items.*'jsd' or 'skew_kl'"):
        trainer.train()
    make_trainer(teacher=teacher, divergence="jsd", head_mode=mode, max_steps=1).train()


def test_a_resumed_run_tells_of_another_divergence(make_trainer, tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(divergence="jsd", **settings).train()
    trainer = make_trainer(divergence="reverse_kl", **settings | {"max_steps": 3})
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    assert "divergence was 'jsd' when the checkpoint was saved and is 'reverse_kl' now" in caplog.text
