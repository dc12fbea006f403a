"""The switched head: sampled classes, all classes of some tokens, or none; equal to the full head, and gone after."""

import accelerate
import pytest
import torch
from head_cases import LENGTH, POSITIONS, REFUSED, SAMPLED, gradients
from head_cases import C as CLASSES
from head_cases import N as EXAMPLES
from tiny_models import FAMILIES, bart, bert_tokens, images, llama, patched_modules, spread_out, tails_of_items, tokens
from torch import nn

from hf_dis.head.switch import SampledHead
from hf_dis.items import Items
from hf_dis.models.head_features import head_features
from hf_dis.models.head_search import find_head_layers, find_heads

C, N = 11, 3
ITEM_IDS = torch.tensor([[0, 4, 4, 10], [1, 2, 3, 0], [10, 9, 8, 7]])  # with a class twice in an item
TAIL_IDS = torch.tensor([[0, 5, 9]])
TAILS = torch.tensor([[0, 5, 9], [3, 5, 10]])
NO_IDS = torch.empty(1, 0, dtype=torch.long)


def model_and_head(family, dtype=torch.float64):
    build, size = FAMILIES[family]
    torch.manual_seed(0)
    model = spread_out(build(C), 10).to(dtype)
    return model, SampledHead(model, find_head_layers(model, C)), images(N, size, dtype=dtype)


@pytest.mark.parametrize("tail_ids", [TAIL_IDS, TAILS, NO_IDS], ids=["two strata", "several tails", "per item"])
@pytest.mark.parametrize("family", FAMILIES)
def test_switched_head_equals_the_full_head_at_the_sampled_classes(family, tail_ids):
    """Logits and every gradient of the model, in training mode, float64 to 1e-10 of the whole gradient's norm."""
    model, head, pixels = model_and_head(family)
    model.train()
    torch.manual_seed(1)
    full = model(pixel_values=pixels).logits
    full = full.gather(1, torch.cat([ITEM_IDS, tails_of_items(tail_ids, N)], 1))
    expected = gradients(model, full)
    torch.manual_seed(1)
    with head.only(ITEM_IDS, tail_ids):
        sampled = model(pixel_values=pixels).logits
        found = gradients(model, sampled)
    torch.testing.assert_close(sampled, full, rtol=1e-10, atol=1e-10)
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all((found[name] - expected[name]).norm() <= 1e-10 * whole for name in expected)


@pytest.mark.parametrize("tail_ids", [TAIL_IDS, TAILS, NO_IDS], ids=["two strata", "several tails", "per item"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_sparse_head_has_the_gradient_of_the_full_one_in_the_sampled_rows(family, tail_ids):
    """All gradients of the model, float64 to 1e-10; the head's are sparse, and of no other row."""
    model, head, pixels = model_and_head(family)
    model.eval()
    full = model(pixel_values=pixels).logits
    expected = gradients(model, full.gather(1, torch.cat([ITEM_IDS, tails_of_items(tail_ids, N)], 1)))
    with SampledHead(model, list(head.layers), row_sparse=True).only(ITEM_IDS, tail_ids):
        found = gradients(model, model(pixel_values=pixels).logits)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    names = {name for name, parameter in model.named_parameters() if any(parameter is p for p in head.parameters())}
    assert found.keys() == expected.keys() > names and len(names) == 2
    for name, gradient in found.items():
        assert gradient.is_sparse == (name in names)
        if gradient.is_sparse:
            assert gradient._indices()[0].tolist() == sampled_classes(tail_ids)  # each once, in order
            gradient = gradient.to_dense()
        assert (gradient - expected[name]).norm() <= 1e-10 * whole


def sampled_classes(tail_ids):
    return sorted({*ITEM_IDS.flatten().tolist(), *tail_ids.flatten().tolist()})


def test_the_full_head_is_back_after_an_exception():
    model, head, pixels = model_and_head("ViT")
    with pytest.raises(KeyError), head.only(ITEM_IDS, TAIL_IDS):
        raise KeyError
    assert patched_modules(model) == []
    with pytest.raises(ValueError, match=r"shape \(3, 16\) for 2 items"), head.only(ITEM_IDS[:2], TAIL_IDS):
        model(pixel_values=pixels)
    assert patched_modules(model) == []


def test_clearing_twice_or_unset_does_nothing():
    _, head, _ = model_and_head("ViT")
    head.clear()
    head.set(ITEM_IDS, TAIL_IDS)
    head.clear()
    head.clear()
    assert "forward" not in vars(head.module)


def test_a_forward_that_others_put_on_the_head_comes_back():
    """accelerate's hooks and quantisers replace the instance's forward too."""
    model = nn.Sequential(nn.Linear(5, C))
    linear = model[0]
    linear.forward = original = lambda features: nn.functional.linear(features, linear.weight, linear.bias)
    head = SampledHead(model, ["0"])
    with head.only(ITEM_IDS, TAIL_IDS):
        linear(torch.randn(N, 5))
    assert vars(linear).get("forward") is original


# All classes of some tokens

ITEMS = Items(EXAMPLES, positions=POSITIONS, length=LENGTH)
OF_TOKENS = [name for name, case in SAMPLED.items() if case.has_token_items]
EXACT = ["ESM", "DoRA on the head", "another adapter on the head", "trainable_token_indices, a tied head"]


def assert_all_classes_at_the_items(model, names, inputs):
    """Logits, and every gradient to 1e-10 of the whole gradient's norm."""
    full = ITEMS.of(model(**inputs).logits)
    expected = gradients(model, full)
    head = SampledHead(model, names)
    head.set_positions(ITEMS)
    found_logits = model(**inputs).logits
    found = gradients(model, found_logits)
    head.clear()
    torch.testing.assert_close(found_logits, full, rtol=1e-10, atol=1e-10)
    assert full.std() > 0.01 and found.keys() == expected.keys() and patched_modules(model) == []
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all((found[name] - expected[name]).norm() <= 1e-10 * whole for name in expected)


@pytest.mark.parametrize("find", [find_heads, find_head_layers], ids=["heads", "layers"])
@pytest.mark.parametrize("case", OF_TOKENS)
def test_all_classes_of_some_tokens_are_those_of_the_full_head(case, find):
    """Heads as exact distillation switches them, with their adapters inside, and layers as a warm-up does."""
    model, _, inputs, _ = SAMPLED[case].prepared()
    assert_all_classes_at_the_items(model.eval(), find(model, CLASSES), inputs)


@pytest.mark.parametrize("case", EXACT)
def test_heads_that_cannot_be_sampled_compute_all_classes_of_some_tokens(case):
    torch.manual_seed(0)
    model = REFUSED[case][0]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # an untrained model answers alike for all classes
    assert_all_classes_at_the_items(model, find_heads(model, CLASSES), tokens(EXAMPLES, CLASSES, LENGTH))


def test_a_head_that_is_the_embedding_is_left_as_it_is():
    model = REFUSED["FSMT"][0]().eval()
    inputs = {**tokens(EXAMPLES, CLASSES, LENGTH), "decoder_input_ids": tokens(EXAMPLES, CLASSES, LENGTH)["input_ids"]}
    full = model(**inputs).logits
    head = SampledHead(model, find_heads(model, CLASSES))
    head.set_positions(ITEMS)
    torch.testing.assert_close(model(**inputs).logits, full)
    head.clear()
    assert patched_modules(model) == []


def test_tokens_that_the_model_adds_are_refused():
    """Prompt learning does: which answer is about which token cannot be known."""
    model = llama(CLASSES)
    head = SampledHead(model, ["lm_head"])
    shorter = tokens(EXAMPLES, CLASSES, LENGTH + 2)
    for switch in (head.set_positions, head.hold):
        switch(ITEMS)
        with pytest.raises(ValueError, match=r"logits of \(3, 8\) tokens for the \(3, 6\)"):
            model(**shorter)
        head.clear()


def test_features_that_the_model_flattened():
    linear = nn.Linear(5, CLASSES)
    head, features = SampledHead(nn.Sequential(linear), ["0"]), torch.randn(EXAMPLES * LENGTH, 5)
    full = linear(features)[POSITIONS]
    head.set_positions(ITEMS)
    assert torch.equal(linear(features), full)
    holding = head.hold(ITEMS)
    assert linear(features).shape == (len(ITEMS), 1) and torch.equal(holding.features, features[POSITIONS])
    head.clear()


# No class


@pytest.mark.parametrize("case", [name for name in SAMPLED if "two heads" not in name and "sequences" not in name])
def test_a_holding_head_keeps_the_features_and_computes_no_class(case):
    model, _, inputs, positions = SAMPLED[case].prepared()
    (name,) = find_heads(model.eval(), CLASSES)
    items = Items(EXAMPLES) if positions is None else ITEMS
    full, expected = model(**inputs).logits, head_features(model, model.get_submodule(name), inputs)
    head = SampledHead(model, [name])
    holding = head.hold(items)
    logits = model(**inputs).logits
    head.clear()
    assert logits.shape == (len(items), 1)
    torch.testing.assert_close(holding.features, items.of(expected))
    assert patched_modules(model) == [] and torch.equal(model(**inputs).logits, full)


def test_a_head_of_several_layers_cannot_hold():
    model, head, _, _ = SAMPLED["LoRA on BART's head"].prepared()
    with pytest.raises(ValueError, match=r"several layers: .*lm_head.base_layer, .*lm_head.lora_B.default.*one layer"):
        head.hold(ITEMS)
    assert patched_modules(model) == [] and not any("final_logits_bias" in vars(module) for module in model.modules())


# Every state


def states(head):
    """Switches a head into each of its states in turn."""
    head.set(torch.zeros(len(ITEMS), 2, dtype=torch.long), torch.tensor([[0, 3, 5]]), POSITIONS)
    yield "sampled"
    head.set_positions(ITEMS)
    yield "at positions"
    yield head.hold(ITEMS)
    head.clear()


def test_the_bias_of_all_logits_is_added_once_in_every_state():
    model = bart(CLASSES, spread=10).eval()
    inputs = {**tokens(EXAMPLES, CLASSES, LENGTH), "decoder_input_ids": tokens(EXAMPLES, CLASSES, LENGTH)["input_ids"]}
    bias, full = model.final_logits_bias, ITEMS.of(model(**inputs).logits)
    columns = torch.tensor([0, 0, 0, 3, 5])
    for state in states(SampledHead(model, ["lm_head"])):
        logits = model(**inputs).logits
        if state == "sampled":
            torch.testing.assert_close(logits, full[:, columns])
        elif state == "at positions":
            torch.testing.assert_close(logits, full)
        else:
            assert logits.shape == (len(ITEMS), 1)
            torch.testing.assert_close(model.lm_head.weight @ state.features.mT + bias.mT, full.mT)
        assert model.state_dict()["final_logits_bias"] is not None
        assert torch.equal(model._buffers["final_logits_bias"], bias)
    assert model.final_logits_bias is bias and "final_logits_bias" not in vars(model)


@pytest.mark.parametrize("build", [llama, bert_tokens], ids=["no bias", "bias"])
def test_under_autocast_every_state_is_the_full_head_in_bfloat16(build):
    model = build(CLASSES, spread=10).eval()
    (name,) = find_heads(model, CLASSES)
    inputs, head = tokens(EXAMPLES, CLASSES, LENGTH), SampledHead(model, [name])
    with torch.autocast("cpu", torch.bfloat16):
        full = ITEMS.of(model(**inputs).logits)
        for state in states(head):
            logits = model(**inputs).logits
            if state == "sampled":
                assert logits.dtype == full.dtype == torch.bfloat16
                torch.testing.assert_close(logits[:, 2:], full[:, [0, 3, 5]], rtol=2e-2, atol=2e-2)
            elif state == "at positions":
                assert torch.equal(logits, full)
            else:
                features = state.features
    assert torch.equal(nn.functional.linear(features.bfloat16(), *cast(head.module)), full)


def cast(layer):
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return layer.weight.bfloat16(), bias


def test_the_forward_that_accelerate_put_on_a_head_runs_and_comes_back():
    """An offloaded model: without the hook the head has no weights."""
    model = llama(CLASSES, spread=10).eval()
    inputs = tokens(EXAMPLES, CLASSES, LENGTH)
    full = ITEMS.of(model(**inputs).logits)
    accelerate.cpu_offload(model, torch.device("cpu"))
    hooked, head = vars(model.lm_head)["forward"], SampledHead(model, ["lm_head"])
    assert model.lm_head.weight.is_meta
    head.set_positions(ITEMS)
    assert vars(model.lm_head)["forward"] is not hooked
    torch.testing.assert_close(model(**inputs).logits, full)
    holding = head.hold(ITEMS)  # from one state to another, without clear between
    model(**inputs)
    head.clear()
    assert vars(model.lm_head)["forward"] is hooked and "full_forward" not in vars(model.lm_head)
    torch.testing.assert_close(model.lm_head(holding.features), full)
