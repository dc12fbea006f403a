"""A model's logits by chunks of items: the same as the whole model's, and never more than a chunk of them."""

import copy
from types import SimpleNamespace

import accelerate
import pytest
import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tiny_models import SMALL, bart, bert_mlm, gpt2, llama, llama_sequences, resnet, t5, tokens, vit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_dis.items import Items, split_examples, token_items
from hf_dis.teacher.stream import LogitStream

V = 50
LM = {"vocab_size": V, "num_key_value_heads": 2, **SMALL}


def gemma2():
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(head_dim=8, final_logit_softcapping=0.05, **LM))


def granite():
    return hf.GraniteForCausalLM(hf.GraniteConfig(logits_scaling=3.0, **LM))


def cohere():
    return hf.CohereForCausalLM(hf.CohereConfig(**LM))


def biased_bart():
    model = bart(V)
    model.final_logits_bias.normal_()
    return model


SPLIT = {
    "Llama": lambda: llama(V),
    "GPT-2": lambda: gpt2(V),
    "BERT": lambda: bert_mlm(V),
    "T5": lambda: t5(V),
    "Bart": biased_bart,
    "Gemma-2": gemma2,
    "Granite": granite,
    "Cohere": cohere,
}


def batch(model):
    inputs = tokens(5, V)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    items = token_items(None, inputs["attention_mask"], inputs["input_ids"].shape, False)
    return inputs, items


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("chunk_items", [4, 100])
def test_the_output_layer_is_applied_by_chunks_of_items(name, chunk_items, caplog):
    torch.manual_seed(0)
    model = SPLIT[name]().eval().double()
    inputs, items = batch(model)
    stream = LogitStream(model, V, chunk_items)
    chunks = list(stream(inputs, items))
    assert [len(chunk) for chunk in chunks][:-1] == [chunk_items] * (len(chunks) - 1)
    whole = items.of(model(**inputs).logits)
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=0, atol=1e-12)
    assert "cannot be split" not in caplog.text


def test_the_body_runs_once_and_the_head_on_no_more_than_a_chunk():
    model = llama(V).eval()
    inputs, items = batch(model)
    stream = LogitStream(model, V, 4)
    list(stream(inputs, items))
    seen = {"body": 0, "head": []}
    model.model.register_forward_hook(lambda *args: seen.update(body=seen["body"] + 1))
    model.lm_head.register_forward_hook(lambda module, args, output: seen["head"].append(output.numel() // V))
    list(stream(inputs, items))
    assert seen["body"] == 1 and max(seen["head"]) <= 4 and sum(seen["head"]) == len(items)


class Rescaled(hf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.log_softmax(-1)
        return outputs


def test_a_model_that_goes_on_after_its_output_layer_runs_whole(caplog):
    model = Rescaled(llama(V).config).eval()
    inputs, items = batch(model)
    chunks = list(LogitStream(model, V, 12)(inputs, items))
    torch.testing.assert_close(torch.cat(chunks), items.of(model(**inputs).logits))
    assert [len(chunk) for chunk in chunks] == [11, 11, 6]  # two examples at a time
    assert "Rescaled cannot be split" in caplog.text and "chunks of examples" in caplog.text


@pytest.mark.parametrize(
    ("model", "why"), [(lambda: llama_sequences(V), "picks tokens after"), (None, "two output heads")]
)
def test_models_that_cannot_be_split(model, why, caplog):
    if model is None:
        shape = {"image_size": 8, "patch_size": 4, "num_labels": V, **SMALL}
        model = hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**shape)).eval()
        inputs = {"pixel_values": torch.randn(5, 3, 8, 8)}
    else:
        model, inputs = model().eval(), tokens(5, V)
    logits = torch.cat(list(LogitStream(model, V, 2)(inputs, Items(5))))
    torch.testing.assert_close(logits, model(**inputs).logits)
    assert why in caplog.text


@pytest.mark.parametrize("build", [vit, resnet])
def test_image_classifiers_are_split(build, caplog):
    model = build(V).eval()
    inputs = {"pixel_values": torch.randn(5, 3, 32 if build is resnet else 8, 32 if build is resnet else 8)}
    chunks = list(LogitStream(model, V, 2)(inputs, Items(5)))
    torch.testing.assert_close(torch.cat(chunks), model(**inputs).logits)
    assert [len(chunk) for chunk in chunks] == [2, 2, 1] and not caplog.records


def test_any_module_with_logits():
    class Echo(nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=x)

    logits = torch.randn(5, 6, V)
    items = token_items(torch.randint(2, (5, 6)) - 100, None, (5, 6), False)
    found = torch.cat(list(LogitStream(Echo(), V, 12)({"x": logits}, items)))
    assert torch.equal(found, items.of(logits))


def test_no_items_give_one_empty_chunk():
    model = llama(V).eval()
    inputs, _ = batch(model)
    items = token_items(torch.full((5, 6), -100), None, (5, 6), True)
    assert [chunk.shape for chunk in LogitStream(model, V)(inputs, items)] == [(0, V)]


def test_split_examples():
    items, table, scalar = torch.arange(5), torch.arange(3), torch.tensor(2.0)
    inputs = {"x": items, "table": table, "scale": scalar, "flag": True, "none": None}
    chunks = list(split_examples(inputs, 5, 2))
    assert [chunk["x"].tolist() for chunk in chunks] == [[0, 1], [2, 3], [4]]
    for chunk in chunks:
        assert chunk["table"] is table and chunk["scale"] is scalar
        assert chunk["flag"] is True and chunk["none"] is None


# A multiplier that AfterHead does not know


class Multiplied(hf.LlamaForCausalLM):
    """Multiplies its logits by an attribute of its own, as Falcon-H1 does by ``lm_head_multiplier``."""

    multiplier = 0.3

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * self.multiplier
        return outputs


def test_a_model_that_multiplies_its_logits_is_not_split(caplog):
    model = Multiplied(llama(V).config).eval()
    inputs, items = batch(model)
    stream = LogitStream(model, V, 12)
    assert not stream.splits(inputs, items) and not stream.splits(inputs, items)
    torch.testing.assert_close(torch.cat(list(stream(inputs, items))), items.of(model(**inputs).logits))
    assert "Multiplied cannot be split" in caplog.text and "are not those of its output layer" in caplog.text


def test_a_multiplier_of_one_is_split():
    model = Multiplied(llama(V).config).eval()
    model.multiplier = 1.0
    assert LogitStream(model, V, 12).splits(*batch(model))


def test_the_comparison_is_made_once_and_leaves_the_model_as_it_was():
    model, calls = llama(V).train(), []
    model.model.layers[0].eval()
    inputs, items = batch(model)
    model.register_forward_hook(lambda *args: calls.append(args))
    stream = LogitStream(model, V, 12)
    assert all(stream.splits(inputs, items) for _ in range(3))
    assert len(calls) == 1 and len(calls[0][2].logits) == 1  # one example, whole
    assert model.training and not model.model.layers[0].training


def test_a_head_that_is_the_embedding_is_not_split(caplog):
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "decoder_start_token_id": 1}
    for part in ("encoder", "decoder"):
        shape |= {f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    config = hf.FSMTConfig(src_vocab_size=V, tgt_vocab_size=V, langs=["en", "de"], **shape)
    model = hf.FSMTForConditionalGeneration(config).eval()
    inputs, items = batch(model)
    torch.testing.assert_close(
        torch.cat(list(LogitStream(model, V, 12)(inputs, items))), items.of(model(**inputs).logits)
    )
    assert "its output layer is its embedding" in caplog.text


def test_a_model_that_moved_is_read_anew():
    """Its buffers are other ones then, as the bias that Bart adds to its logits."""
    model = biased_bart().eval()
    inputs, items = batch(model)
    stream = LogitStream(model, V, 12)
    list(stream(inputs, items))
    model.double()
    (logits, *_) = stream(inputs, items)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, items.of(model(**inputs).logits)[:12], rtol=0, atol=1e-12)


# Devices


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_an_offloaded_model_with_a_bias_after_its_head(offload_buffers):
    plain = biased_bart().eval()
    inputs, items = batch(plain)
    expected = items.of(plain(**inputs).logits)
    model = accelerate.cpu_offload(copy.deepcopy(plain), torch.device("cpu"), offload_buffers=offload_buffers)
    stream = LogitStream(model, V, 12)
    torch.testing.assert_close(torch.cat(list(stream(inputs, items))), expected)
    assert stream.splits(inputs, items) is not offload_buffers


def spread_llama(hooks):
    """The body on one accelerator, the head on another; with accelerate's hooks or, on one device alone, without."""
    with torch.device("cuda:0"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=V, pad_token_id=0, **SMALL)).eval()
    if hooks:
        model.lm_head = nn.Linear(SMALL["hidden_size"], V, bias=False, device="cuda:1")
        add_hook_to_module(model, AlignDevicesHook("cuda:0", io_same_device=True))
        add_hook_to_module(model.lm_head, AlignDevicesHook("cuda:1"))
    return model


@pytest.mark.parametrize("splits", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("hooks", [True, False], ids=["spread", "on another device"])
@pytest.mark.parametrize("device", ["cuda:2", "cpu"])
def test_the_logits_are_on_the_device_of_the_inputs(device, hooks, splits, monkeypatch):
    """On fake tensors, whose devices cannot be mixed, and whose values cannot be compared."""
    with FakeTensorMode():
        model = spread_llama(hooks)
        ids = torch.ones(5, 6, dtype=torch.long, device=device)
        items = token_items(None, None, ids.shape, False, ids.device) if splits else Items(5)
        stream = LogitStream(model, V, 12)
        monkeypatch.setattr(stream, "_compare", lambda *args: None if splits else stream._run_whole("no"))
        chunks = list(stream({"input_ids": ids, "use_cache": False}, items))
        assert {chunk.device for chunk in chunks} == {ids.device} and sum(map(len, chunks)) == len(items)
        features = torch.ones(3, SMALL["hidden_size"], device=device)
        if splits:
            assert stream.of_features(features).device == ids.device
