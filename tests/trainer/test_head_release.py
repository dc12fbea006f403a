"""compute_loss outside training_step: the loss is that of a step, and the student is an ordinary model after it."""

import pytest
import torch
from tiny_models import bart, images, labelled_images, labelled_tokens, llama, patched_modules, vit

V = 40
BUILDS = {"image": vit, "causal LM": llama, "bias after the head": bart}


def batch_of(build):
    items = labelled_images(4, V) if build is vit else labelled_tokens(4, V)
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}


@pytest.fixture(params=BUILDS)
def case(request, make_trainer):
    """Makes a trainer in a mode of the head, and a batch for it."""
    build = BUILDS[request.param]

    def make(head_mode, **keywords):
        trainer = make_trainer(build(V), build(V, seed=1, spread=30), head_mode=head_mode, **keywords)
        return trainer, batch_of(build)

    return make


def assert_ordinary(model, batch):
    assert patched_modules(model) == [] and not any("final_logits_bias" in vars(m) for m in model.modules())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert model.eval()(**inputs).logits.shape[-1] == V


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("head_mode", ["sampled", "exact"])
def test_the_head_is_released(case, head_mode, training):
    trainer, batch = case(head_mode)
    trainer.model.train(training)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape[-1] == (6 + 1 + 8 if training and head_mode == "sampled" else V)
    assert_ordinary(trainer.model, batch)
    assert loss.item() > 0
    if training:
        loss.backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in trainer.head.parameters())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("head_mode", ["sampled", "exact"])
@pytest.mark.parametrize("where", ["the student's forward", "the loss"])
def test_the_head_is_released_after_an_exception(case, monkeypatch, head_mode, training, where):
    trainer, batch = case(head_mode)
    trainer.compute_loss(trainer.model.train(training), batch)  # what is checked at the first step is checked
    switched = []

    def fails(*args, **kwargs):
        switched.append(patched_modules(trainer.model))
        raise KeyError("in the step")

    begin = trainer.distiller.begin

    def begin_and_fail(*args, **kwargs):
        step = begin(*args, **kwargs)
        if where == "the loss":
            step.loss = fails
        else:
            monkeypatch.setattr(trainer.model, "forward", fails)
        return step

    monkeypatch.setattr(trainer.distiller, "begin", begin_and_fail)
    trainer._evaluation.holds_logits = False  # so that an evaluation switches the head too
    with pytest.raises(KeyError, match="in the step"):
        trainer.compute_loss(trainer.model, batch)
    monkeypatch.undo()
    is_image = "pixel_values" in batch
    assert any(switched[0]) or (head_mode == "exact" and training and is_image), "the head was not switched"
    assert_ordinary(trainer.model, batch)


def test_it_is_released_where_the_step_cannot_begin(make_trainer, monkeypatch):
    trainer = make_trainer()
    head_set = type(trainer.head).set

    def set_and_fail(head, *args, **kwargs):
        head_set(head, *args, **kwargs)
        raise KeyError("while it begins")

    monkeypatch.setattr(type(trainer.head), "set", set_and_fail)
    trainer.model.train()
    trainer.distiller._head_is_checked = True
    with pytest.raises(KeyError, match="while it begins"):
        trainer.compute_loss(trainer.model, batch_of(vit))
    assert patched_modules(trainer.model) == []


def test_a_training_step_keeps_the_head_switched_until_backward(make_trainer, monkeypatch):
    trainer, seen = make_trainer(max_steps=1), []
    backward = trainer.accelerator.backward

    def look(*args, **kwargs):
        seen.append(patched_modules(trainer.model))
        backward(*args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "backward", look)
    trainer.train()
    assert seen == [["classifier"]] and patched_modules(trainer.model) == []
    assert trainer.model(pixel_values=images(2)).logits.shape == (2, V)
