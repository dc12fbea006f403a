"""The maths of the demo: answers, samples and errors of its models, and what it refuses."""

import numpy as np
import pytest
import torch
from answers import MEAN, SIZE, SPREAD, Glyphs, Texts, drawn, exact_loss, head_of, measure
from demo_models import NAMES, write_glyphs, write_texts
from glyph_task import NORMALISE


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    return Glyphs.load(write_glyphs(tmp_path_factory.mktemp("glyphs")))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return Texts.load(write_texts(tmp_path_factory.mktemp("texts")))


def image():
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)


def test_the_models_are_given_what_they_were_trained_on(glyphs):
    pixels = NORMALISE(torch.from_numpy(image())[None, None])
    assert torch.allclose(pixels, (torch.from_numpy(image()).float() / 255 - MEAN) / SPREAD, atol=1e-6)
    item = glyphs.ask(image())
    assert torch.allclose(item.student, glyphs.student(pixels).logits, atol=1e-5)
    assert torch.allclose(item.teacher, glyphs.teacher(pixels).logits, atol=1e-5)
    weight, bias = head_of(glyphs.student, len(NAMES))
    assert torch.allclose(item.features @ weight.T + bias, item.student, atol=1e-5)
    assert glyphs.label(0) == "A U+0041"


def test_the_exact_gradient_is_that_of_the_definition(glyphs, dense_kd):
    item = glyphs.ask(image())
    weight, bias = head_of(glyphs.student, len(NAMES))
    features = [item.features.clone().requires_grad_() for _ in range(2)]
    exact_loss(len(NAMES))(features[0], weight, bias, item.teacher).backward()
    dense_kd(features[1] @ weight.T + bias, item.teacher, 2.0).sum().backward()
    assert torch.allclose(features[0].grad, features[1].grad, atol=1e-5)


@pytest.mark.parametrize("kind", ["glyphs", "texts"])
def test_a_larger_budget_has_a_smaller_error(kind, request):
    models = request.getfixturevalue(kind)
    items = models.asked if kind == "glyphs" else models.ask("import numpy")
    num_classes = items.teacher.shape[1]
    found = [measure(models.student, items.last(), items, size) for size in (4, 16, 48, num_classes + 5)]
    errors = [one.error for one in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > 2 * errors[2] and errors[-1] < 1e-3
    assert [len(one.classes) for one in found] == [4, 16, 48, num_classes]
    assert found[0].products == 3 * 4 * found[0].num_features


def test_the_sample_is_told_by_class_and_rank(glyphs):
    item = glyphs.ask(image())
    budget = measure(glyphs.student, item, glyphs.asked, 12)
    order = item.teacher[0].argsort(descending=True)
    assert torch.equal(order[budget.ranks], budget.classes) and len(set(budget.classes.tolist())) == 12
    assert torch.equal(measure(glyphs.student, item, glyphs.asked, 12).classes, budget.classes)


def test_a_drawing_becomes_an_image():
    ink = np.zeros((320, 320), np.uint8)
    ink[100:120, 50:60] = 255
    found = drawn(ink)
    assert found.shape == (32, 32) and found[10, 5] == found[11, 5] == 255 and found.sum() == 2 * 255
    with pytest.raises(ValueError, match="the sketch is empty: draw a character"):
        drawn(np.zeros((320, 320), np.uint8))


def test_without_models_the_command_is_told(tmp_path, texts):
    with pytest.raises(FileNotFoundError, match=r"teacher, dis, examples missing. Run `make demo` first"):
        Glyphs.load(tmp_path)
    write_glyphs(tmp_path, num_examples=0)
    with pytest.raises(FileNotFoundError, match=r"has no trained student: examples missing"):
        Glyphs.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"_teacher/config.json is missing. Run `accelerate launch"):
        Texts.load(tmp_path / "dis")
    with pytest.raises(ValueError, match="the text is empty"):
        texts.ask("")


def test_tokens_are_shown_with_their_spaces(texts):
    (number,) = texts.tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert texts.label(number) == "' '"
