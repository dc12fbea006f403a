"""Training through the real Trainer: it learns, it normalises, it logs, it leaves an ordinary model."""

import copy
from itertools import pairwise

import pytest
import torch
from tiny_models import assert_near, images, labelled_images, patched_modules, resnet, vit
from transformers import ViTForImageClassification

from hf_dis import steps as steps_module

ALL_BY_STRATA = {"num_sampled_classes": 10, "rank_depth": 10, "num_shared_classes": 40}
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def trained(trainer):
    trainer.train()
    return parameters(trainer)


# Learning


@pytest.mark.parametrize("build", [vit, resnet])
@pytest.mark.parametrize(
    "layout", [{}, {"num_shared_classes": 0, "design": "replacement"}], ids=["strata", "per item"]
)
def test_the_student_learns_from_sampled_classes(make_trainer, build, layout):
    trainer = make_trainer(build(40), max_steps=40, eval_dataset=labelled_images(32, 40), **layout)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"] and after["eval_kl"] < 0.3 * before["eval_kl"]


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("build", [vit, resnet])
def test_sampling_all_classes_trains_as_exact_distillation_does(make_trainer, build, labelled):
    """The whole path (sample, switched head, loss, backward, optimizer) against head_mode="exact"."""
    items = labelled_images(32, 40)
    if not labelled:
        items = [{"pixel_values": item["pixel_values"]} for item in items]
    student = build(40)
    results = [
        trained(make_trainer(copy.deepcopy(student), head_mode=mode, train_dataset=items, **SGD, **ALL_BY_STRATA))
        for mode in ("exact", "sampled")
    ]
    assert not torch.equal(results[0]["classifier.bias" if build is vit else "classifier.1.bias"], torch.zeros(40))
    assert_near(*results, tolerance=1e-5)


def test_the_exact_step_is_that_of_the_definition(make_trainer, dense_kd, dense_ce):
    student, teacher, items = vit(40), vit(40, seed=1, spread=30), labelled_images(8, 40)
    pixels, labels = torch.stack([r["pixel_values"] for r in items]), torch.tensor([r["labels"] for r in items])
    reference = copy.deepcopy(student)
    logits, target = reference(pixel_values=pixels).logits, teacher(pixel_values=pixels).logits.detach()
    loss = (0.7 * dense_kd(logits, target, 3.0) + 0.3 * dense_ce(logits, labels)).mean()
    loss.backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in reference.named_parameters()}
    trainer = make_trainer(
        student,
        teacher,
        head_mode="exact",
        temperature=3.0,
        hard_label_weight=0.3,
        train_dataset=items,
        **SGD | {"max_steps": 1, "logging_steps": 1},
    )
    assert_near(trained(trainer), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("proposal", ["dis", "teacher"])
def test_the_proposal_learns_in_every_step(make_trainer, proposal):
    trainer = make_trainer(proposal=proposal)
    learnt = trainer.distiller.sampler.proposal.state_dict
    states = [{name: value.clone() for name, value in learnt().items()}]
    step = trainer.training_step

    def remembered(*args, **kwargs):
        loss = step(*args, **kwargs)
        states.append({name: value.clone() for name, value in learnt().items()})
        return loss

    trainer.training_step = remembered
    trainer.train()
    assert len(states) == 5
    for before, after in pairwise(states):
        assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_cross_entropy_alone_needs_no_distillation(make_trainer):
    trainer = make_trainer(head_mode="exact", hard_label_weight=1.0, logging_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(logs["ce_loss"], rel=1e-4)


# Normalisation: the same items give the same gradient, however they are split


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize(
    "mode",
    [{"head_mode": "exact"}, {"proposal": "topk", "num_shared_classes": 0}],
    ids=["exact", "sampled, fixed sample"],
)
def test_accumulation_is_one_large_batch(make_trainer, mode, labelled):
    items = labelled_images(32, 40)
    if not labelled:
        items = [{"pixel_values": item["pixel_values"]} for item in items]
    student, results, losses = vit(40), [], []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            copy.deepcopy(student),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            logging_steps=1,
            train_dataset=items,
            **SGD,
            **mode,
        )
        results.append(trained(trainer))
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert_near(results[1], results[0])
    assert_near(results[2], results[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "mode",
    [{"head_mode": "exact"}, {"proposal": "topk", "num_shared_classes": 0}],
    ids=["exact", "sampled, fixed sample"],
)
def test_a_smaller_last_micro_batch_counts_by_its_items(make_trainer, mode):
    """20 items at once, or as 8 + 8 + 4: a mean of means would weigh the last four double."""
    student, items, results = vit(40), labelled_images(20, 40), []
    for size, steps in ((20, 1), (8, 3)):
        trainer = make_trainer(
            copy.deepcopy(student),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            train_dataset=items,
            **SGD | {"max_steps": 2},
            **mode,
        )
        results.append(trained(trainer))
    assert_near(*results)


# Precision


@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_bf16_trains_and_evaluates(make_trainer, mode):
    trainer = make_trainer(head_mode=mode, bf16=True, logging_steps=1, eval_dataset=labelled_images(12, 40))
    before = parameters(trainer)
    trainer.train()
    assert all(log["loss"] > 0 for log in trainer.state.log_history if "loss" in log)
    assert not torch.equal(before["classifier.weight"], trainer.model.classifier.weight)
    assert trainer.model.classifier.weight.dtype == torch.float32
    assert trainer.evaluate()["eval_kl"] > 0


def test_bf16_trains_a_head_with_a_bias(make_trainer):
    make_trainer(vit(40, spread=30), bf16=True, max_steps=1).train()


def test_bf16_probes(make_trainer):
    make_trainer(resnet(40), bf16=True, max_steps=1, probe_steps=1).train()


# Logs


def logged(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_logs_carry_losses_diagnostics_and_the_proposal(make_trainer):
    logs = logged(make_trainer(logging_steps=2, probe_steps=2, max_steps=4))
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(0.9 * log["kd_loss"] + 0.1 * log["ce_loss"], rel=1e-4)
        assert 1 <= log["dis/ess"] <= 15 and 0 < log["dis/coverage"] <= 1 and 0 <= log["dis/certain"] <= 1
        weights = [value for name, value in log.items() if name.startswith("dis/laplace_")]
        assert set(log) >= {"dis/laplace_0.5", "dis/laplace_2"} and sum(weights) == pytest.approx(1)
        assert set(log) >= {f"probe/{f}" for f in ("exact_kd_loss", "sampled_kd_loss", "cosine", "relative_error")}


def test_samples_are_measured_every_tenth_step_and_once_between_logs(make_trainer, monkeypatch):
    steps = []
    measured = make_trainer(logging_steps=4, max_steps=21)
    looked_at = steps_module.sample_quality
    monkeypatch.setattr(
        steps_module, "sample_quality", lambda *args: steps.append(measured.state.global_step) or looked_at(*args)
    )
    assert all("dis/ess" in log for log in logged(measured))
    assert steps == [0, 4, 8, 10, 12, 16, 20]


def test_without_labels_there_is_no_cross_entropy(make_trainer):
    items = [{"pixel_values": image} for image in images(16)]
    for mode in ("sampled", "exact"):
        (log,) = logged(make_trainer(train_dataset=items, head_mode=mode, max_steps=1, logging_steps=1))
        assert "ce_loss" not in log and log["loss"] == pytest.approx(log["kd_loss"], rel=1e-4)


def test_probes_come_every_so_many_steps(make_trainer):
    logs = logged(make_trainer(logging_steps=1, probe_steps=3, max_steps=5))
    assert ["probe/cosine" in log for log in logs] == [True, False, False, True, False]
    assert not any("probe/cosine" in log for log in logged(make_trainer(logging_steps=1, max_steps=2)))


def test_where_all_classes_are_computed_there_is_nothing_to_probe(make_trainer):
    logs = logged(make_trainer(head_mode="exact", logging_steps=1, probe_steps=1, max_steps=2))
    assert len(logs) == 2 and not any(name.startswith(("probe/", "dis/")) for log in logs for name in log)


def test_a_probe_measures_the_step_it_belongs_to(make_trainer, dense_kd):
    items, student, teacher = labelled_images(8, 40), vit(40), vit(40, seed=1, spread=30)
    pixels = torch.stack([item["pixel_values"] for item in items])
    exact = dense_kd(student(pixels).logits, teacher(pixels).logits, 2.0).mean()
    (log,) = logged(make_trainer(student, teacher, probe_steps=1, train_dataset=items, logging_steps=1, max_steps=1))
    assert log["probe/exact_kd_loss"] == pytest.approx(exact.item(), rel=1e-4)
    assert log["probe/sampled_kd_loss"] == pytest.approx(log["kd_loss"], rel=1e-4)


def test_a_probe_changes_nothing(make_trainer):
    """Not even the running statistics of batch normalisation."""
    assert_near(trained(make_trainer(resnet(40), probe_steps=1)), trained(make_trainer(resnet(40))), tolerance=0)


def test_the_probe_of_a_complete_sample_finds_no_error(make_trainer):
    (log,) = logged(make_trainer(probe_steps=1, logging_steps=1, max_steps=1, **ALL_BY_STRATA))
    assert log["probe/relative_error"] < 1e-4 and log["probe/cosine"] == pytest.approx(1, abs=1e-5)
    assert log["probe/exact_kd_loss"] == pytest.approx(log["kd_loss"], rel=1e-4)
    assert log["dis/coverage"] == pytest.approx(1, abs=1e-5) and log["dis/certain"] == 1


# The student, the teacher, the optimizer


def test_after_training_the_student_is_an_ordinary_model(make_trainer):
    student, teacher = vit(40), vit(40, seed=1, spread=30)
    keys, answers = list(student.state_dict()), teacher(pixel_values=images(4)).logits
    trainer = make_trainer(student, teacher, probe_steps=2)
    trainer.train()
    assert patched_modules(trainer.model) == [] and list(trainer.model.state_dict()) == keys
    assert trainer.model(pixel_values=images(4)).logits.shape == (4, 40)
    assert not teacher.training and torch.equal(teacher(pixel_values=images(4)).logits, answers)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_a_step_leaves_no_patch(make_trainer, monkeypatch, where):
    trainer = make_trainer()

    def fails(*args):
        assert patched_modules(trainer.model) != [], "the head is not switched: the test tests nothing"
        raise KeyError("in the step")

    if where == "forward":
        monkeypatch.setattr(steps_module, "sampled_loss", fails)
    else:
        monkeypatch.setattr(trainer.accelerator, "backward", fails)
    with pytest.raises(KeyError, match="in the step"):
        trainer.train()
    assert patched_modules(trainer.model) == []
    assert trainer.evaluate(labelled_images(8, 40))["eval_loss"] > 0


def test_model_init_makes_the_student_that_is_trained(make_trainer):
    made = []

    def init():
        made.append(vit(40, seed=0))
        return made[-1]

    trainer = make_trainer(model_init=init)
    assert_near(trained(trainer), trained(make_trainer(vit(40, seed=0))), tolerance=0)
    assert trainer.model is made[-1] and all(patched_modules(model) == [] for model in made)


def test_a_teacher_may_be_a_path(make_trainer, tmp_path):
    teacher = vit(40, seed=1, spread=30)
    teacher.save_pretrained(tmp_path / "teacher")
    assert_near(trained(make_trainer(teacher=str(tmp_path / "teacher"))), trained(make_trainer(teacher=teacher)), 0)


def test_gradient_checkpointing_runs_the_switched_head(make_trainer):
    expected = trained(make_trainer(**SGD))
    assert_near(trained(make_trainer(gradient_checkpointing=True, **SGD)), expected)


@pytest.mark.parametrize("build", [vit, resnet])
def test_the_head_has_a_learning_rate_of_its_own(make_trainer, build):
    trainer = make_trainer(build(40), learning_rate=1e-3, head_learning_rate=5e-2, weight_decay=0.1)
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    head = dict(trainer.head.module.named_parameters())
    assert len(rate) == sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
    in_top = {id(parameter) for parameter in head.values()}
    assert all(value == (5e-2 if key in in_top else 1e-3) for key, value in rate.items())
    assert decay[id(head["weight"])] == 0.1 and decay[id(head["bias"])] == 0
    before = trained(make_trainer(build(40), head_learning_rate=0.0))
    name = f"{trainer.distiller.head_layers[0]}.weight"
    assert torch.equal(before[name], build(40).state_dict()[name])


def test_the_student_is_tagged(make_trainer):
    assert "hf_dis" in make_trainer().model.model_tags


def test_without_one_the_groups_are_the_trainers(make_trainer):
    trainer = make_trainer()
    trainer.create_optimizer()
    assert len(trainer.optimizer.param_groups) == 2


class ForwardWithoutLabels(ViTForImageClassification):
    def forward(self, pixel_values):
        return super().forward(pixel_values=pixel_values)


def test_labels_reach_the_loss_of_a_student_whose_forward_takes_none(make_trainer):
    """Trainer itself would drop the column, and cross-entropy with it."""
    trainer = make_trainer(ForwardWithoutLabels(vit(40).config), max_steps=1, logging_steps=1)
    trainer.train()
    assert "ce_loss" in trainer.state.log_history[0]
