"""The switched output head: found, checked, equal to the full one, and gone without a trace."""

import pytest
import torch
from models import FAMILIES, images, patched_modules, resnet, spread_out, vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM

import hf_dis.drawn
from hf_dis.drawn import drawn_logits
from hf_dis.heads import SampledHead, check_head, find_head, head_features, sampling_pays

C, N = 11, 3
ROW_IDS = torch.tensor([[0, 4, 4, 10], [1, 2, 3, 0], [10, 9, 8, 7]])  # with a class twice in a row
SHARED_IDS = torch.tensor([0, 5, 9])
NO_IDS = torch.empty(0, dtype=torch.long)


def model_and_head(family, dtype=torch.float64):
    build, size = FAMILIES[family]
    torch.manual_seed(0)
    model = spread_out(build(C), 10).to(dtype)
    return model, SampledHead(model.get_submodule(find_head(model, C))), images(N, size, dtype=dtype)


def gradients(model, logits):
    """Gradients of some function of the logits that treats no two of them alike."""
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    model.zero_grad()
    (weights * logits.log_softmax(1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shared_ids", [SHARED_IDS, NO_IDS], ids=["two strata", "per row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_switched_head_equals_the_full_head_at_the_drawn_classes(family, shared_ids):
    """Logits and every gradient of the model, in training mode, float64 to 1e-10 of the whole gradient's norm."""
    model, head, pixels = model_and_head(family)
    model.train()
    torch.manual_seed(1)
    full = model(pixel_values=pixels).logits
    full = torch.cat([full.gather(1, ROW_IDS), full[:, shared_ids]], 1)
    expected = gradients(model, full)
    torch.manual_seed(1)
    with head.only(ROW_IDS, shared_ids):
        drawn = model(pixel_values=pixels).logits
        found = gradients(model, drawn)
    torch.testing.assert_close(drawn, full, rtol=1e-10, atol=1e-10)
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all((found[name] - expected[name]).norm() <= 1e-10 * whole for name in expected)


@pytest.mark.parametrize("shared_ids", [SHARED_IDS, NO_IDS], ids=["two strata", "per row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_sparse_head_has_the_gradient_of_the_full_one_in_the_drawn_rows(family, shared_ids):
    """All gradients of the model, float64 to 1e-10; the head's are sparse, and of no other row."""
    model, head, pixels = model_and_head(family)
    model.eval()
    full = model(pixel_values=pixels).logits
    expected = gradients(model, torch.cat([full.gather(1, ROW_IDS), full[:, shared_ids]], 1))
    with SampledHead(head.module, row_sparse=True).only(ROW_IDS, shared_ids):
        found = gradients(model, model(pixel_values=pixels).logits)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    names = {
        name for name, parameter in model.named_parameters() if any(parameter is p for p in head_parameters(head))
    }
    assert found.keys() == expected.keys() > names and len(names) == 2
    for name, gradient in found.items():
        assert gradient.is_sparse == (name in names)
        if gradient.is_sparse:
            assert gradient._indices()[0].tolist() == drawn_classes(shared_ids)  # each once, in order
            gradient = gradient.to_dense()
        assert (gradient - expected[name]).norm() <= 1e-10 * whole


def head_parameters(head):
    return list(head.module.parameters())


def drawn_classes(shared_ids):
    return sorted({*ROW_IDS.flatten().tolist(), *shared_ids.tolist()})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_its_check_and_is_left_as_it_was(family):
    model, head, pixels = model_and_head(family, torch.float32)
    keys = list(model.state_dict())
    model.train()
    check_head(model, head, {"pixel_values": pixels[:2]}, "head")
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
    with pytest.raises(ValueError, match=r"shape \(3, 16\) for 2 rows"), head.only(ROW_IDS[:2], SHARED_IDS):
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
    linear = nn.Linear(5, C)
    linear.forward = original = lambda features: nn.functional.linear(features, linear.weight, linear.bias)
    head = SampledHead(linear)
    with head.only(ROW_IDS, SHARED_IDS):
        linear(torch.randn(N, 5))
    assert vars(linear).get("forward") is original


# Drawn logits


def drawn_inputs(dtype=torch.float64, bias=True):
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(N, 5), (C, 5), (C,)]]
    return tensors if bias else [*tensors[:2], None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ids", [(ROW_IDS, SHARED_IDS), (ROW_IDS, NO_IDS)], ids=["two strata", "per row"])
def test_drawn_logits_gradcheck(ids, bias):
    inputs = drawn_inputs(bias=bias)
    features, weight, bias = inputs
    torch.testing.assert_close(
        drawn_logits(*inputs, *ids)[:, :4], nn.functional.linear(features, weight, bias).gather(1, ROW_IDS)
    )
    assert torch.autograd.gradcheck(lambda *tensors: drawn_logits(*tensors, *ids), inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients_are_computed(wanted):
    """A frozen head, or frozen features."""
    reference = drawn_inputs()
    frozen = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(reference)]
    for tensors in (reference, frozen):
        drawn_logits(*tensors, ROW_IDS, SHARED_IDS).square().sum().backward()
    for i, (tensor, expected) in enumerate(zip(frozen, reference, strict=True)):
        assert torch.equal(tensor.grad, expected.grad) if i in wanted else tensor.grad is None


@pytest.mark.parametrize("elements", [1, 4 * 5 * 2])
def test_chunks_of_rows_change_nothing(elements, monkeypatch):
    whole = drawn_inputs()
    chunked = [tensor.detach().requires_grad_() for tensor in whole]
    expected = drawn_logits(*whole, ROW_IDS, SHARED_IDS)
    expected.square().sum().backward()
    monkeypatch.setattr(hf_dis.drawn, "GATHER_ELEMENTS", elements)
    found = drawn_logits(*chunked, ROW_IDS, SHARED_IDS)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    for one, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("elements", [1, 2**22], ids=["chunked", "whole"])
def test_under_autocast_the_head_computes_in_bfloat16_and_keeps_float32_gradients(elements, monkeypatch):
    monkeypatch.setattr(hf_dis.drawn, "GATHER_ELEMENTS", elements)
    inputs = drawn_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        full = nn.functional.linear(*inputs)
        drawn = drawn_logits(*inputs, ROW_IDS, SHARED_IDS)
    assert drawn.dtype == torch.bfloat16
    expected = torch.cat([full.gather(1, ROW_IDS), full[:, SHARED_IDS]], 1)
    torch.testing.assert_close(drawn, expected, rtol=2e-2, atol=2e-2)
    drawn.float().square().sum().backward()
    found = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    expected.float().square().sum().backward()
    for tensor, gradient in zip(inputs, found, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, tensor.grad, rtol=2e-2, atol=2e-2 * float(tensor.grad.abs().max()))


def test_no_gather_exceeds_the_chunk(monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr(hf_dis.drawn, "GATHER_ELEMENTS", 2 * 16 * 32)
    features, weight = torch.randn(64, 32, requires_grad=True), torch.randn(20, 32, requires_grad=True)
    row_ids = torch.randint(20, (64, 16))
    with Largest() as largest:
        drawn_logits(features, weight, None, row_ids, SHARED_IDS).sum().backward()
    assert (
        largest.elements <= (64 + 3) * 32
    )  # features and the shared classes' rows; all gathered rows are 64 * 16 * 32


@pytest.mark.parametrize("bias", [True, False])
def test_row_sparse_gradients_add_up(bias):
    """Two backward passes with other classes, as accumulation makes them, and under autocast."""
    dense, sparse = drawn_inputs(bias=bias), drawn_inputs(bias=bias)
    draws = [(ROW_IDS, SHARED_IDS), (ROW_IDS[:, :1] * 0 + 6, NO_IDS), (ROW_IDS, SHARED_IDS)]
    for tensor, other in zip(sparse, dense, strict=True):
        if tensor is not None:
            tensor.data = other.data.clone()
    for ids in draws:
        for tensors, row_sparse in ((dense, False), (sparse, True)):
            drawn_logits(*tensors, *ids, row_sparse).square().sum().backward()
    for tensor, other in zip(sparse[1 : 2 + bias], dense[1:], strict=False):
        assert tensor.grad.is_sparse and not other.grad.is_sparse
        torch.testing.assert_close(tensor.grad.to_dense(), other.grad, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_size_of_the_head_is_made_for_row_sparse_gradients():
    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and not tensor.is_sparse and not tensor.requires_grad:
                    self.elements = max(self.elements, tensor.numel())
            return result

    largest = {}
    for row_sparse in (True, False):
        features, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
        bias = torch.zeros(5000, requires_grad=True)
        with Shapes() as shapes:
            drawn_logits(features, weight, bias, torch.randint(5000, (4, 6)), SHARED_IDS, row_sparse).sum().backward()
            torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        largest[row_sparse] = shapes.elements
    assert largest[True] <= 4 * 6 * 8 + 3 * 8 and largest[False] == 5000 * 8


@pytest.mark.parametrize("row_sparse", [True, False])
@pytest.mark.parametrize("bad", [-1, C])
def test_classes_that_the_head_does_not_have_are_an_error_before_anything_is_computed(bad, row_sparse):
    for ids in ((ROW_IDS.clone().fill_(bad), SHARED_IDS), (ROW_IDS, torch.tensor([bad]))):
        with pytest.raises(IndexError, match="index out of range"):
            drawn_logits(*drawn_inputs(), *ids, row_sparse)


# Features


def test_features_are_what_the_head_is_given():
    model, head, pixels = model_and_head("ResNet")
    model.train()
    features = head_features(model, head.module, {"pixel_values": pixels})
    assert model.training
    model.eval()
    torch.testing.assert_close(head.module(features), model(pixel_values=pixels).logits)
    assert not head.module._forward_pre_hooks


# Finding and checking


@pytest.mark.parametrize(
    ("family", "name"),
    [("ViT", "classifier"), ("ResNet", "classifier.1"), ("RegNet", "classifier.1"), ("Swin", "classifier")],
)
def test_the_head_is_the_only_linear_layer_with_c_outputs(family, name):
    build, _ = FAMILIES[family]
    assert find_head(build(C), C) == name


def test_a_model_that_names_its_head_is_believed():
    """A vocabulary as large as a hidden layer leaves several candidates."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=64, **size))
    assert find_head(model, 64) == "cls.predictions.decoder"


def test_several_candidates_are_listed_and_head_name_decides():
    model = vit(16)  # as many classes as hidden units
    with pytest.raises(ValueError, match=r"candidates are \[.*'classifier'\].*head_name.*head_mode='exact'"):
        find_head(model, 16)
    assert find_head(model, 16, "classifier") == "classifier"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clasifier", r"'clasifier', but ViTForImageClassification has no such module.*\['classifier'\]"),
        ("vit", r"'vit', a ViTModel: .*nn.Linear with 11 outputs; candidates: \['classifier'\]"),
    ],
)
def test_a_wrong_head_name_is_refused_with_the_candidates(name, message):
    with pytest.raises(ValueError, match=message):
        find_head(vit(C), C, name)


def test_no_candidate_is_refused():
    with pytest.raises(ValueError, match="candidates are none"):
        find_head(vit(C), 12)


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
    head = SampledHead(model.get_submodule("classifier.1"))
    with pytest.raises(ValueError, match=rf"Rescaled does not return the output of 'classifier.1'.*{gap}"):
        check_head(Rescaled(model, change), head, {"pixel_values": images(2, 32)}, "classifier.1")
    assert patched_modules(model) == []


def test_the_wrong_layer_is_refused():
    model = vit(16, spread=10)
    name = next(name for name in dict(model.named_modules()) if name.endswith(("query", "q_proj")))
    with pytest.raises(ValueError, match=r"does not return the output|one feature vector a row"):
        check_head(model, SampledHead(model.get_submodule(name)), {"pixel_values": images(2)}, name)
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
    head = SampledHead(model.classifier)
    check_head(Narrow(model), head, inputs, "classifier", torch.bfloat16)
    with pytest.raises(ValueError, match="off by up to"):
        check_head(Rescaled(Narrow(model), lambda z: z.log_softmax(1)), head, inputs, "classifier", torch.bfloat16)


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
        check_head(model, SampledHead(model.head), {"features": features}, "head")


# When drawing pays


def test_sampling_pays_only_where_there_are_many_classes():
    assert not sampling_pays(100, 64, 512)[0]
    pays, why = sampling_pays(100_000, 64, 512)
    assert pays and "64" in why and "512" in why and "100,000" in why
