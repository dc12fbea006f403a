"""A compiled student: one graph break at the switched head, and no compilation for each new number of items."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from tiny_models import bart, images, llama, tokens, vit
from torch._dynamo.testing import CompileCounterWithBackend

from hf_dis.head.switch import SampledHead
from hf_dis.items import Items
from hf_dis.models.head_search import find_head_layers

C = 23
TAIL_IDS = torch.tensor([[0, 5, 9]])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def step(model, head, inputs, num_items, positions):
    """Logits of a training step, and the gradients it leaves."""
    model.zero_grad()
    item_ids = torch.randint(C, (num_items, 4), generator=torch.Generator().manual_seed(num_items))
    with head.only(item_ids, TAIL_IDS, positions):
        logits = model(**inputs).logits
        logits.logsumexp(1).sum().backward()
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def breaks_at_the_head_only():
    (reason,) = torch._dynamo.utils.counters["graph_break"]
    return "_switched_forward" in reason


def text(build):
    inputs = tokens(4, C, 8)
    if build is bart:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


@pytest.mark.parametrize("build", [llama, pytest.param(bart, marks=pytest.mark.slow)])
def test_batches_with_other_numbers_of_supervised_tokens_are_not_compiled_anew(build):
    model, inputs = build(C, spread=10), text(build)
    head = SampledHead(model, find_head_layers(model, C))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for num_items in (20, 13, 17, 9, 21, 30, 12):
        positions = torch.arange(num_items)
        expected = step(model, head, inputs, num_items, positions)
        found = step(compiled, head, inputs, num_items, positions)
        torch.testing.assert_close(found[0], expected[0])
        for name, gradient in expected[1].items():
            torch.testing.assert_close(found[1][f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)
        graphs.append(counter.frame_count)
    assert (
        graphs[1:] == [graphs[1]] * 6 and graphs[1] <= 3
    )  # before the head, after it, and that for any number of items
    assert breaks_at_the_head_only()
    assert compiled(**inputs).logits.shape == (4, 8, C)


def exact_step(model, head, inputs, num_items, is_held):
    """Logits of a training step on all classes, from the features that the head keeps or by the head."""
    items = Items(4, positions=torch.arange(num_items), length=8)
    held = head.hold_in_training(items) if is_held else head.set_positions(items)
    logits = model(**inputs).logits
    head.clear()
    return F.linear(held.features, head.module.weight) if is_held else logits


@pytest.mark.parametrize("is_held", [True, False], ids=["held", "at positions"])
def test_steps_on_all_classes_are_not_compiled_anew(is_held):
    model, inputs = llama(C, spread=10), text(llama)
    head = SampledHead(model, find_head_layers(model, C))
    counter = CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(model, backend=counter), []
    for num_items in (20, 13, 17, 9, 21):
        found, expected = (exact_step(one, head, inputs, num_items, is_held) for one in (compiled, model))
        assert found.shape == (num_items, C)
        torch.testing.assert_close(found, expected)
        graphs.append(counter.frame_count)
    assert graphs[1:] == [graphs[1]] * 4 and graphs[1] <= 3
    assert breaks_at_the_head_only()


def test_a_classifier_is_compiled_once():
    model = vit(C, spread=10)
    head = SampledHead(model, find_head_layers(model, C))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for seed in range(4):
        step(compiled, head, {"pixel_values": images(3, seed=seed)}, 3, None)
    assert counter.frame_count == 1 and breaks_at_the_head_only()


def test_it_trains_as_one_that_is_not_compiled(make_trainer):
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "max_grad_norm": 0.0, "logging_steps": 1}
    losses = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = make_trainer(**settings, **compiled)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
