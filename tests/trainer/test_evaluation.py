"""Evaluation and prediction: the full head, and losses averaged over items, against a dense reference."""

import pytest
import torch
from tiny_models import images, labelled_images, resnet, vit

CLASSES, ITEMS = 40, 20  # 20 items in batches of 8: the last one is smaller


@pytest.fixture
def reference(dense_kd, dense_ce):
    """The metrics of an evaluation set, from dense float64 losses of all its items at once."""

    def metrics(student, teacher, items, temperature=2.0, weight=0.1, prefix="eval"):
        pixels = torch.stack([item["pixel_values"] for item in items])
        with torch.no_grad():
            logits, target = student.eval()(pixels).logits, teacher.eval()(pixels).logits
        kd, kl = dense_kd(logits, target, temperature).mean(), dense_kd(logits, target, 1.0).mean()
        expected = {"loss": kd, "kd_loss": kd, "kl": kl}
        if "labels" in items[0]:
            ce = dense_ce(logits, torch.tensor([item["labels"] for item in items])).mean()
            expected |= {"loss": (1 - weight) * kd + weight * ce, "ce_loss": ce}
        return {f"{prefix}_{name}": value.item() for name, value in expected.items()}

    return metrics


def losses(metrics):
    return {name: value for name, value in metrics.items() if name.endswith(("loss", "_kl"))}


@pytest.mark.parametrize("mode", ["sampled", "exact"])
@pytest.mark.parametrize("when", ["before training", "after training"])
@pytest.mark.parametrize("build", [vit, resnet])
def test_evaluation_is_the_dense_mean_over_items(make_trainer, reference, build, when, mode):
    student, teacher = build(CLASSES), build(CLASSES, seed=1, spread=30)
    items = labelled_images(ITEMS, CLASSES, seed=5)
    trainer = make_trainer(student, teacher, head_mode=mode, max_steps=2, eval_dataset=items)
    if when == "after training":
        trainer.train()
    assert losses(trainer.evaluate()) == pytest.approx(reference(student, teacher, items), rel=1e-4)


def test_temperature_and_weight_enter_the_evaluation(make_trainer, reference):
    student, teacher, items = vit(CLASSES), vit(CLASSES, seed=1, spread=30), labelled_images(ITEMS, CLASSES)
    trainer = make_trainer(student, teacher, temperature=4.0, hard_label_weight=0.6, eval_dataset=items)
    assert losses(trainer.evaluate()) == pytest.approx(reference(student, teacher, items, 4.0, 0.6), rel=1e-4)


def test_evaluations_between_steps_do_not_mix_with_training(make_trainer, reference):
    """Evaluated twice as often as logged: the training means go to the training logs, whole."""
    items = labelled_images(ITEMS, CLASSES)
    student, teacher = vit(CLASSES), vit(CLASSES, seed=1, spread=30)
    trainer = make_trainer(
        student, teacher, eval_dataset=items, eval_strategy="steps", eval_steps=1, logging_steps=2, max_steps=4
    )
    trainer.train()
    history = trainer.state.log_history
    assert sum("eval_kl" in log for log in history) == 4
    for log in history:
        if "loss" in log:
            assert log["loss"] == pytest.approx(0.9 * log["kd_loss"] + 0.1 * log["ce_loss"], rel=1e-4)
        if "eval_kl" in log:
            assert not {"kd_loss", "dis/ess", "dis/laplace_0.5"} & set(log)
    last = [log for log in history if "eval_kl" in log][-1]
    assert losses(last) == pytest.approx(reference(student, teacher, items), rel=1e-4)
    plain = make_trainer(vit(CLASSES), teacher, logging_steps=2, max_steps=4)
    plain.train()
    trained = [[log["kd_loss"] for log in run.state.log_history if "loss" in log] for run in (trainer, plain)]
    assert trained[0] == trained[1]


def test_compute_metrics_sees_every_logit_of_every_item(make_trainer):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"top1": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    student, items = vit(CLASSES), labelled_images(ITEMS, CLASSES)
    trainer = make_trainer(student, eval_dataset=items, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    expected = student.eval()(torch.stack([item["pixel_values"] for item in items])).logits
    torch.testing.assert_close(torch.tensor(seen[0].predictions), expected)
    assert seen[0].label_ids.tolist() == [item["labels"] for item in items]
    assert 0 <= metrics["eval_top1"] <= 1 and metrics["eval_kl"] > 0


def test_prediction_needs_no_labels(make_trainer, reference):
    student, teacher = vit(CLASSES), vit(CLASSES, seed=1, spread=30)
    items = [{"pixel_values": image} for image in images(ITEMS)]
    output = make_trainer(student, teacher).predict(items)
    assert output.predictions.shape == (ITEMS, CLASSES) and output.label_ids is None
    assert losses(output.metrics) == pytest.approx(reference(student, teacher, items, prefix="test"), rel=1e-4)


def test_several_evaluation_sets_are_told_apart(make_trainer, reference):
    student, teacher = vit(CLASSES), vit(CLASSES, seed=1, spread=30)
    sets = {"one": labelled_images(8, CLASSES, seed=1), "other": labelled_images(ITEMS, CLASSES, seed=2)}
    found = losses(make_trainer(student, teacher, eval_dataset=sets).evaluate())
    expected = {}
    for name, items in sets.items():
        expected |= reference(student, teacher, items, prefix=f"eval_{name}")
    assert found == pytest.approx(expected, rel=1e-4)
