"""The check of a head: honest heads pass and are left as they were, dishonest ones are refused with a remedy."""

import pytest
import torch
from tiny_models import FAMILIES, images, llama, patched_modules, resnet, spread_out, tokens, vit
from torch import nn

from hf_dis.head.check import check_head, check_row_sparse_head
from hf_dis.head.switch import SampledHead
from hf_dis.models.head_search import find_head_layers

C, N = 11, 3
ITEM_IDS = torch.tensor([[0, 4, 4, 10], [1, 2, 3, 0], [10, 9, 8, 7]])
TAIL_IDS = torch.tensor([[0, 5, 9]])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_its_check_and_is_left_as_it_was(family):
    build, size = FAMILIES[family]
    model, pixels = spread_out(build(C), 10), images(N, size)
    head = SampledHead(model, find_head_layers(model, C))
    keys = list(model.state_dict())
    model.train()
    check_head(model, head, {"pixel_values": pixels[:2]})
    assert model.training and patched_modules(model) == [] and list(model.state_dict()) == keys
    with head.only(ITEM_IDS, TAIL_IDS):
        assert list(model.state_dict()) == keys and isinstance(head.module, nn.Linear)
        assert len(patched_modules(model)) == 1
    assert patched_modules(model) == [] and list(model.state_dict()) == keys
    assert model(pixel_values=pixels).logits.shape == (N, C)


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
    with pytest.raises(ValueError, match=r"Rescaled cannot continue from .*'model.classifier'.*head_mode='exact'"):
        check_head(model, head, {"pixel_values": images(2)})
    assert patched_modules(model) == []


def test_the_random_state_is_that_of_before_where_a_model_uses_it():
    model = Rescaled(vit(C, spread=10), lambda logits: logits + 0 * torch.rand(1))
    state = torch.get_rng_state()
    check_head(model, SampledHead(model, ["model.classifier"]), {"pixel_values": images(2)})
    assert torch.equal(torch.get_rng_state(), state)


def test_the_wrong_layer_is_refused():
    model = vit(16, spread=10)
    name = next(name for name in dict(model.named_modules()) if name.endswith(("query", "q_proj")))
    with pytest.raises(ValueError, match=r"does not return the output|one feature vector per item"):
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


class OutOfMemory(nn.Module):
    """Runs once, and is out of memory then."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, **inputs):
        self.calls += 1
        if self.calls > 1:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return self.model(**inputs)


def test_out_of_memory_is_not_taken_for_another_head():
    model = OutOfMemory(vit(C, spread=10))
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
        check_head(model, SampledHead(model, ["model.classifier"]), {"pixel_values": images(2)})
    assert patched_modules(model) == []


# Row-sparse


class Scaled(torch.nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


def test_a_row_sparse_head_must_not_be_sharded_by_deepspeed_or_tied_to_a_dense_layer():
    tied, untied = llama(C, tie_word_embeddings=True), llama(C)
    check_row_sparse_head(untied, ["lm_head"], is_sharded=False)
    check_row_sparse_head(tied, ["lm_head"], is_sharded=False)
    tied.model.embed_tokens.scale_grad_by_freq = True
    with pytest.raises(ValueError, match=r"the embedding model.embed_tokens, .*has scale_grad_by_freq"):
        check_row_sparse_head(tied, ["lm_head"], is_sharded=False)
    tied.model.embed_tokens.scale_grad_by_freq = False
    tied.other = torch.nn.Linear(16, C, bias=False)
    tied.other.weight = tied.lm_head.weight
    with pytest.raises(ValueError, match=r"head lm_head is tied to other, and the Linear gives it a dense.*untie it"):
        check_row_sparse_head(tied, ["lm_head"], is_sharded=False)
    tied.lm_head.weight.requires_grad_(False)
    check_row_sparse_head(tied, ["lm_head"], is_sharded=False)
    with pytest.raises(
        ValueError, match=r"DeepSpeed and FSDP of version 1 shard dense gradients only.*fully_shard before"
    ):
        check_row_sparse_head(untied, ["lm_head"], is_sharded=True)


def test_a_row_sparse_head_that_fsdp2_shards_must_not_be_tied_to_a_scaled_embedding():
    tied = llama(C, tie_word_embeddings=True)
    check_row_sparse_head(tied, ["lm_head"], is_sharded="fsdp2")
    tied.model.embed_tokens = Scaled(C, 16)
    tied.model.embed_tokens.weight = tied.lm_head.weight
    check_row_sparse_head(tied, ["lm_head"], is_sharded=False)
    with pytest.raises(
        ValueError, match=r"head lm_head is spread over processes and tied to model.embed_tokens, a Scaled"
    ):
        check_row_sparse_head(tied, ["lm_head"], is_sharded="fsdp2")


def test_a_row_sparse_head_needs_the_norm_of_sparse_gradients(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.1"))
    with pytest.raises(
        ValueError, match=r"torch is 2\.13\.1.*needs torch 2\.14 or newer; or set row_sparse_head=False"
    ):
        check_row_sparse_head(llama(C), ["lm_head"], is_sharded=False)


def test_tokens_are_compared_too():
    model = llama(C, spread=10)
    check_head(model, SampledHead(model, ["lm_head"]), tokens(2, C))
