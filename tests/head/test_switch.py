"""The switched output head: found, checked, equal to the full one, and gone without a trace."""

import pytest
import torch
from tiny_models import FAMILIES, images, patched_modules, resnet, spread_out, vit
from torch import nn

from hf_dis.head.check import check_head
from hf_dis.head.switch import SampledHead
from hf_dis.models.head_features import head_features
from hf_dis.models.head_search import find_head_layers

C, N = 11, 3
ROW_IDS = torch.tensor([[0, 4, 4, 10], [1, 2, 3, 0], [10, 9, 8, 7]])  # with a class twice in an item
SHARED_IDS = torch.tensor([[0, 5, 9]])
TAILS = torch.tensor([[0, 5, 9], [3, 5, 10]])
NO_IDS = torch.empty(1, 0, dtype=torch.long)


def model_and_head(family, dtype=torch.float64):
    build, size = FAMILIES[family]
    torch.manual_seed(0)
    model = spread_out(build(C), 10).to(dtype)
    return model, SampledHead(model, find_head_layers(model, C)), images(N, size, dtype=dtype)


def gradients(model, logits):
    """Gradients of some function of the logits that treats no two of them alike."""
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    model.zero_grad()
    (weights * logits.log_softmax(1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tail_ids", [SHARED_IDS, TAILS, NO_IDS], ids=["two strata", "several tails", "per item"])
@pytest.mark.parametrize("family", FAMILIES)
def test_switched_head_equals_the_full_head_at_the_drawn_classes(family, tail_ids):
    """Logits and every gradient of the model, in training mode, float64 to 1e-10 of the whole gradient's norm."""
    model, head, pixels = model_and_head(family)
    model.train()
    torch.manual_seed(1)
    full = model(pixel_values=pixels).logits
    full = full.gather(1, torch.cat([ROW_IDS, tail_ids(tail_ids, N)], 1))
    expected = gradients(model, full)
    torch.manual_seed(1)
    with head.only(ROW_IDS, tail_ids):
        sampled = model(pixel_values=pixels).logits
        found = gradients(model, sampled)
    torch.testing.assert_close(sampled, full, rtol=1e-10, atol=1e-10)
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all((found[name] - expected[name]).norm() <= 1e-10 * whole for name in expected)


@pytest.mark.parametrize("tail_ids", [SHARED_IDS, TAILS, NO_IDS], ids=["two strata", "several tails", "per item"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_sparse_head_has_the_gradient_of_the_full_one_in_the_drawn_rows(family, tail_ids):
    """All gradients of the model, float64 to 1e-10; the head's are sparse, and of no other item."""
    model, head, pixels = model_and_head(family)
    model.eval()
    full = model(pixel_values=pixels).logits
    expected = gradients(model, full.gather(1, torch.cat([ROW_IDS, tail_ids(tail_ids, N)], 1)))
    with SampledHead(model, list(head.layers), row_sparse=True).only(ROW_IDS, tail_ids):
        found = gradients(model, model(pixel_values=pixels).logits)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    names = {name for name, parameter in model.named_parameters() if any(parameter is p for p in head.parameters())}
    assert found.keys() == expected.keys() > names and len(names) == 2
    for name, gradient in found.items():
        assert gradient.is_sparse == (name in names)
        if gradient.is_sparse:
            assert gradient._indices()[0].tolist() == drawn_classes(tail_ids)  # each once, in order
            gradient = gradient.to_dense()
        assert (gradient - expected[name]).norm() <= 1e-10 * whole


def drawn_classes(tail_ids):
    return sorted({*ROW_IDS.flatten().tolist(), *tail_ids.flatten().tolist()})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_its_check_and_is_left_as_it_was(family):
    model, head, pixels = model_and_head(family, torch.float32)
    keys = list(model.state_dict())
    model.train()
    check_head(model, head, {"pixel_values": pixels[:2]})
    assert model.training and patched_modules(model) == [] and list(model.state_dict()) == keys
    with head.only(ROW_IDS, SHARED_IDS):
        assert list(model.state_dict()) == keys and isinstance(head.module, nn.Linear)
        assert len(patched_modules(model)) == 1
    assert patched_modules(model) == [] and list(model.state_dict()) == keys
    assert model(pixel_values=pixels).logits.shape == (N, C)


def test_the_full_head_is_back_after_an_exception():
    model, head, pixels = model_and_head("ViT")
    with pytest.raises(KeyError), head.only(ROW_IDS, SHARED_IDS):
        raise KeyError
    assert patched_modules(model) == []
    with pytest.raises(ValueError, match=r"shape \(3, 16\) for 2 items"), head.only(ROW_IDS[:2], SHARED_IDS):
        model(pixel_values=pixels)
    assert patched_modules(model) == []


def test_clearing_twice_or_unset_does_nothing():
    _, head, _ = model_and_head("ViT")
    head.clear()
    head.set(ROW_IDS, SHARED_IDS)
    head.clear()
    head.clear()
    assert "forward" not in vars(head.module)


def test_a_forward_that_others_put_on_the_head_comes_back():
    """accelerate's hooks and quantisers replace the instance's forward too."""
    model = nn.Sequential(nn.Linear(5, C))
    linear = model[0]
    linear.forward = original = lambda features: nn.functional.linear(features, linear.weight, linear.bias)
    head = SampledHead(model, ["0"])
    with head.only(ROW_IDS, SHARED_IDS):
        linear(torch.randn(N, 5))
    assert vars(linear).get("forward") is original


# Features


def test_features_are_what_the_head_is_given():
    model, head, pixels = model_and_head("ResNet")
    model.train()
    features = head_features(model, head.module, {"pixel_values": pixels})
    assert model.training
    model.eval()
    torch.testing.assert_close(head.module(features), model(pixel_values=pixels).logits)
    assert not head.module._forward_pre_hooks


# Checking


class Rescaled(nn.Module):
    """Something comes after the head: another order of classes, another scale, or another shape."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        outputs.logits = self.change(outputs.logits)
        return outputs


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        (lambda logits: logits.log_softmax(1), "off by up to"),
        (lambda logits: logits.flip(1), "off by up to"),
        (lambda logits: logits + torch.linspace(0, 1, logits.shape[1]), "off by up to"),
        (lambda logits: logits[:, 1:], "shapes differ"),
    ],
    ids=["log-softmax", "reordered", "bias after the head", "cut"],
)
def test_a_model_that_changes_the_heads_output_is_refused(change, gap):
    model = resnet(C, spread=10)
    head = SampledHead(model, ["classifier.1"])
    with pytest.raises(ValueError, match=rf"Rescaled does not return the output of 'classifier.1'.*{gap}"):
        check_head(Rescaled(model, change), head, {"pixel_values": images(2, 32)})
    assert patched_modules(model) == []


@pytest.mark.parametrize("num_classes", [8, 40])
def test_a_bias_that_is_still_zero_is_refused_too(num_classes):
    """Eight: as many classes as are looked at."""
    model = Rescaled(vit(num_classes, spread=10), lambda logits: logits + torch.zeros(num_classes))
    head = SampledHead(model, ["model.classifier"])
    with pytest.raises(ValueError, match=r"Rescaled cannot go on from .*'model.classifier'.*head_mode='exact'"):
        check_head(model, head, {"pixel_values": images(2)})
    assert patched_modules(model) == []


def test_a_model_that_draws_random_numbers_finds_them_as_they_were():
    model = Rescaled(vit(C, spread=10), lambda logits: logits + 0 * torch.rand(1))
    state = torch.get_rng_state()
    check_head(model, SampledHead(model, ["model.classifier"]), {"pixel_values": images(2)})
    assert torch.equal(torch.get_rng_state(), state)


def test_the_wrong_layer_is_refused():
    model = vit(16, spread=10)
    name = next(name for name in dict(model.named_modules()) if name.endswith(("query", "q_proj")))
    with pytest.raises(ValueError, match=r"does not return the output|one feature vector an item"):
        check_head(model, SampledHead(model, [name]), {"pixel_values": images(2)})
    assert patched_modules(model) == []


class Narrow(nn.Module):
    """Computes in bfloat16 and answers in float32, as accelerate makes a model do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.model(**inputs)
        outputs.logits = outputs.logits.float()
        return outputs


@pytest.mark.parametrize("seed", range(3))
def test_under_autocast_the_heads_agree_to_its_precision(seed):
    """The bias is added before or after rounding: float32's tolerance would refuse an honest head."""
    model, inputs = vit(200, seed, spread=30), {"pixel_values": images(2, seed=seed)}
    head = SampledHead(model, ["classifier"])
    check_head(Narrow(model), head, inputs, torch.bfloat16)
    with pytest.raises(ValueError, match="off by up to"):
        check_head(Rescaled(Narrow(model), lambda z: z.log_softmax(1)), head, inputs, torch.bfloat16)


@pytest.mark.parametrize("width", [64, 2048])
def test_float32_rounding_passes(width):
    """Features as a ResNet's: many, positive, the products largely cancelling."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(width, 1000)
            nn.init.normal_(self.head.weight, std=0.3)

        def forward(self, features):
            return type("Outputs", (), {"logits": self.head(features)})

    model = Model()
    for seed in range(5):
        features = torch.rand(2, width, generator=torch.Generator().manual_seed(seed)) * 3
        check_head(model, SampledHead(model, ["head"]), {"features": features})
