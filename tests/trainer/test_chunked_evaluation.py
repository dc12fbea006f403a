"""Evaluation without metrics of one's own: the student's logits exist in chunks, and the means are the same."""

import pytest
import torch
from tiny_models import (
    bart,
    gpt2_sequences,
    images,
    labelled_images,
    labelled_tokens,
    llama,
    patched_modules,
    resnet,
    vit,
)

from hf_dis import cache_teacher_targets

CLASSES, CHUNK = 40, 3
IMAGES, TEXTS = {"vit": vit, "resnet": resnet}, {"llama": llama, "bart": bart}
BUILDS = IMAGES | TEXTS
MEANS = {"eval_loss", "eval_kd_loss", "eval_ce_loss", "eval_kl"}


def data_of(build, num_items=12):
    if build in IMAGES.values():
        return labelled_images(num_items, CLASSES)
    items = labelled_tokens(num_items, CLASSES)
    for number, item in enumerate(items):
        item["labels"][: number % 4] = -100
    return items


def count_items(build, data):
    if build in IMAGES.values():
        return len(data)
    return sum(int((item["labels"][build is llama :] != -100).sum()) for item in data)


def trainer_of(make_trainer, build, **keywords):
    """A trainer whose chunks hold three items; notes the number of rows of each output of the head with C columns."""
    data = data_of(build)
    student, teacher = build(CLASSES, spread=3), build(CLASSES, seed=1, spread=30)
    trainer = make_trainer(student, teacher, **{"train_dataset": data, "eval_dataset": data, **keywords})
    for stream in (trainer.distiller.online_teacher.stream, trainer.distiller.student_stream):
        stream.chunk_items = CHUNK
    rows = []

    def note(module, args, output):
        if output.shape[-1] == CLASSES:
            rows.append(output.numel() // CLASSES)

    trainer.head.module.register_forward_hook(note)
    return trainer, rows


def means(metrics):
    return {name: metrics[name] for name in MEANS}


def no_metrics(prediction):
    return {}


@pytest.mark.parametrize("mode", ["sampled", "exact"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_the_means_are_those_of_the_logits_as_a_whole(make_trainer, build, mode):
    whole, whole_rows = trainer_of(make_trainer, build, compute_metrics=no_metrics, head_mode=mode)
    expected = means(whole.evaluate())
    length = 1 if build in IMAGES.values() else 6
    assert whole_rows == [8 * length, 4 * length]
    trainer, rows = trainer_of(make_trainer, build, head_mode=mode)
    assert means(trainer.evaluate()) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    rows.clear()  # of the first evaluation, which computes the first example both ways
    assert means(trainer.evaluate()) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert max(rows) == CHUNK and sum(rows) == count_items(build, trainer.eval_dataset)
    assert patched_modules(trainer.model) == []


def test_in_bf16_they_are_the_same_too(make_trainer):
    results = []
    for given in ({"compute_metrics": no_metrics}, {}):
        trainer, _ = trainer_of(make_trainer, llama, bf16=True, **given)
        results.append(means(trainer.evaluate()))
    assert results[1] == pytest.approx(results[0], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_metrics_of_ones_own_are_given_every_logit(make_trainer, build):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    trainer, _ = trainer_of(make_trainer, build, compute_metrics=compute_metrics)
    trainer.evaluate()
    logits = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert logits.shape == ((12, CLASSES) if build in IMAGES.values() else (12, 6, CLASSES))
    trainer, _ = trainer_of(make_trainer, build)
    predictions = trainer.predict(data_of(build)).predictions
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    assert predictions.shape == logits.shape


@pytest.mark.parametrize("build", TEXTS.values(), ids=TEXTS)
def test_the_student_generates_between_and_after(make_trainer, build):
    trainer, _ = trainer_of(make_trainer, build, eval_strategy="steps", eval_steps=1, max_steps=2)
    ids = torch.arange(3, 9)[None]

    def generate():
        return trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)

    trainer.evaluate()
    expected = generate()
    trainer.evaluate()
    assert torch.equal(generate(), expected)
    trainer.train()
    generate()
    assert trainer.model(**trainer.data_collator(data_of(build))).logits.shape == (12, 6, CLASSES)
    assert patched_modules(trainer.model) == []
    assert not any("final_logits_bias" in vars(module) for module in trainer.model.modules())


def test_a_student_that_cannot_be_split_is_computed_as_a_whole(make_trainer):
    items = [{**item, "labels": number} for number, item in enumerate(labelled_tokens(12, 50))]
    results = []
    for given in ({"compute_metrics": no_metrics}, {}):
        pair = gpt2_sequences(CLASSES), gpt2_sequences(CLASSES, seed=1, spread=30)
        results.append(means(make_trainer(*pair, train_dataset=items, eval_dataset=items, **given).evaluate()))
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_evaluation_from_a_cache_is_computed_in_chunks_too(make_trainer, tmp_path):
    teacher, items = vit(CLASSES, seed=1, spread=30), labelled_images(12, CLASSES)
    cache = cache_teacher_targets(teacher, items, tmp_path / "cache", depth=6, sample_size=8)
    results = []
    for given in ({"compute_metrics": no_metrics}, {}):
        settings = {"train_dataset": items, "eval_dataset": items, "rank_depth": None}
        trainer = make_trainer(teacher_cache=cache, eval_teacher_cache=cache, **settings, **given)
        metrics = trainer.evaluate()
        results.append({name: metrics[name] for name in ("eval_loss", "eval_kd_loss", "eval_ce_loss")})
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_an_exception_in_an_evaluation_leaves_no_patch(make_trainer, monkeypatch):
    trainer, _ = trainer_of(make_trainer, vit)
    seen = []

    def fails(*args, **kwargs):
        seen.append(patched_modules(trainer.model))
        raise KeyError("in the evaluation")

    trainer.evaluate()
    monkeypatch.setattr(trainer.model.vit.layernorm, "forward", fails)
    with pytest.raises(KeyError, match="in the evaluation"):
        trainer.evaluate()
    assert "classifier" in seen[0], "the head is not switched: the test tests nothing"
    monkeypatch.undo()
    assert patched_modules(trainer.model) == []
    assert trainer.model(pixel_values=images(2)).logits.shape == (2, CLASSES)
    assert trainer.predict(labelled_images(4, CLASSES)).predictions.shape == (4, CLASSES)


def test_a_batch_outside_an_evaluation_has_every_logit_again(make_trainer):
    trainer, _ = trainer_of(make_trainer, vit)
    trainer.evaluate()
    batch = trainer.data_collator(data_of(vit))
    _, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    assert outputs.logits.shape == (12, CLASSES)
