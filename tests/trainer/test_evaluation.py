"""Evaluation and prediction: the full head, and losses averaged over items, against a dense reference."""

import pytest
import torch
from tiny_models import images, labelled_images, labelled_tokens, llama, resnet, vit

from hf_dis import DISDistillationTrainer

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


# An override of compute_loss


class Shifted(DISDistillationTrainer):
    """Adds a constant to the loss of each batch, as a penalty would."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss + 3, outputs) if return_outputs else loss + 3


class ByBatch(DISDistillationTrainer):
    """Adds the number of examples of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + len(next(iter(inputs.values())))
        return (loss, outputs) if return_outputs else loss


class Own(DISDistillationTrainer):
    """A loss without super's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(pixel_values=inputs["pixel_values"]).logits
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def of_kind(kind, trainer):
    """A trainer of a different class that is made of the same arguments."""
    teacher, data = trainer.distiller.teacher.model, trainer.eval_dataset
    return kind(trainer.model, teacher, trainer.args, train_dataset=trainer.train_dataset, eval_dataset=data)


TEXT = [item | {"labels": item["labels"].clone()} for item in labelled_tokens(12, CLASSES)]
for number, item in enumerate(TEXT):
    item["labels"][: number % 5] = -100  # batches of 8 and 4 examples have other numbers of items too


@pytest.mark.parametrize("build", [vit, llama])
def test_what_an_override_adds_is_in_the_loss_of_the_evaluation_alone(make_trainer, build):
    data = labelled_images(12, CLASSES) if build is vit else TEXT
    plain = make_trainer(build(CLASSES), build(CLASSES, seed=1, spread=30), train_dataset=data, eval_dataset=data)
    expected = losses(plain.evaluate())
    mixed = 0.9 * expected["eval_kd_loss"] + 0.1 * expected["eval_ce_loss"]
    assert expected["eval_loss"] == pytest.approx(mixed, rel=1e-6)
    found = losses(of_kind(Shifted, plain).evaluate())
    assert found.pop("eval_loss") == pytest.approx(expected.pop("eval_loss") + 3, rel=1e-6)
    assert found == expected and len(found) == 3


@pytest.mark.parametrize("build", [vit, llama])
def test_what_an_override_adds_is_averaged_over_items(make_trainer, build):
    """Batches of 8 and of 4 examples: 8 and 4 are added to the loss of each of their items."""
    data = labelled_images(12, CLASSES) if build is vit else TEXT
    plain = make_trainer(build(CLASSES), build(CLASSES, seed=1, spread=30), train_dataset=data, eval_dataset=data)
    counts = [1] * 12 if build is vit else [int((item["labels"][1:] != -100).sum()) for item in TEXT]
    first, last = sum(counts[:8]), sum(counts[8:])
    added = (8 * first + 4 * last) / (first + last)
    found = of_kind(ByBatch, plain).evaluate()["eval_loss"] - plain.evaluate()["eval_loss"]
    assert found == pytest.approx(added, rel=1e-5)
    assert build is vit or added != pytest.approx((8 * 8 + 4 * 4) / 12, rel=1e-3)  # the mean over examples


def test_an_override_reads_every_logit_in_evaluation(make_trainer):
    shapes = []

    class Reading(DISDistillationTrainer):
        def compute_loss(self, *args, **kwargs):
            loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
            shapes.append(tuple(outputs.logits.shape))
            return (loss, outputs) if kwargs.get("return_outputs") else loss

    of_kind(Reading, make_trainer(eval_dataset=labelled_images(12, CLASSES))).evaluate()
    assert shapes == [(8, CLASSES), (4, CLASSES)]


def test_an_override_without_super_is_averaged_as_trainer_does(make_trainer):
    trainer = of_kind(Own, make_trainer(eval_dataset=labelled_images(12, CLASSES)))
    metrics, expected = trainer.evaluate(), make_trainer(eval_dataset=labelled_images(12, CLASSES)).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["eval_ce_loss"], rel=1e-5)
    assert not {"eval_kl", "eval_kd_loss"} & set(metrics)


def test_the_loss_of_a_batch_without_items_is_zero(make_trainer):
    items = [item | {"labels": torch.full_like(item["labels"], -100)} for item in TEXT[:8]] + TEXT[8:]
    pair = llama(CLASSES), llama(CLASSES, seed=1, spread=30)
    found = make_trainer(*pair, train_dataset=TEXT, eval_dataset=items).evaluate()
    expected = make_trainer(*pair, train_dataset=TEXT, eval_dataset=TEXT[8:]).evaluate()
    assert losses(found) == pytest.approx(losses(expected), rel=1e-6)
