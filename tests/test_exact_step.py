"""The step on all classes in blocks, and the students that it computes whole logits of."""

import copy

import pytest
import torch
from test_distiller import (
    CLASSES,
    assert_same,
    dense,
    distiller_of,
    gradients,
    image_batch,
    models,
    text_batch,
)
from tiny_models import bart, llama, vit

from hf_dis.steps import ExactStep


def test_items_of_an_exact_step_may_count_differently():
    """The teacher is asked once more, in backward; also where the sampler learns from its first answers."""
    for kind in ("exact", "warm-up"):
        student, teacher = models(llama)
        reference, batch = copy.deepcopy(student), text_batch()
        expected, _ = dense("causal LM", reference, teacher, batch)
        factors = torch.rand(len(expected), dtype=torch.float64)
        (expected * factors).sum().backward()
        distiller = distiller_of(student, teacher, "exact" if kind == "exact" else "sampled")
        with distiller.step(batch, warming_up=kind == "warm-up", holds_logits=False) as step:
            loss, _ = step.loss(student(**step.inputs))
            (loss * factors).sum().backward()
        assert_same(student, gradients(reference))


def changed(student, how):
    """A student whose logits do not follow from a single linear layer, or by more than that layer."""
    if how == "a hook":
        student.classifier.register_forward_hook(lambda module, args, output: 2 * output)
    elif how == "more after the head":
        forward = student.forward

        def more(**inputs):
            outputs = forward(**inputs)
            outputs.logits = outputs.logits.square()
            return outputs

        student.forward = more
    elif how == "another layer":
        student.classifier = Doubled(student.classifier)
    return student


class Doubled(torch.nn.Linear):
    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, dtype=layer.weight.dtype)

    def forward(self, features):
        return 2 * super().forward(features)


@pytest.mark.parametrize("how", ["a hook", "more after the head", "another layer"])
def test_a_student_that_cannot_be_split_computes_whole_logits(how):
    student, teacher = models(vit)
    changed(student, how)
    batch = image_batch()
    expected, _ = dense("image", student, teacher, batch)
    distiller = distiller_of(student, teacher, "exact")
    with distiller.step(batch, holds_logits=False) as step:
        outputs = student(**step.inputs)
        loss, _ = step.loss(outputs)
    assert outputs.logits.shape == (6, CLASSES)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)


def test_in_float16_all_logits_are_computed():
    """Without a loss scale, which only backward knows, small gradients would vanish."""
    student, teacher = (model.float() for model in models(bart))
    distiller = distiller_of(student, teacher, "exact")
    for dtype, width in ((torch.float16, CLASSES), (torch.bfloat16, 1)):
        with distiller.step(text_batch(), holds_logits=False) as step, torch.autocast("cpu", dtype):
            outputs = student(**step.inputs)
            loss, _ = step.loss(outputs)
        assert outputs.logits.shape == (len(loss), width)
        with distiller.step(text_batch()) as step, torch.autocast("cpu", dtype):
            expected, _ = step.loss(student(**step.inputs))
        torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)  # the bias is added in the type of the product


def test_the_comparison_of_the_first_step_leaves_the_random_state_alone():
    student, teacher = models(vit)
    distiller = distiller_of(student, teacher, "exact")
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with distiller.step(image_batch(), holds_logits=False) as step:
        assert type(step) is ExactStep and student.training
    assert torch.equal(torch.rand(3), expected)
