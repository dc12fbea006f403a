"""The operations after the output layer: bias, scale, soft-cap."""

import pytest
import torch
import transformers as hf
from tiny_models import SMALL, bart, gpt2, llama

from hf_dis.models.after_head import AfterHead

V = 50
LM = {"vocab_size": V, "num_key_value_heads": 2, **SMALL}


def test_nothing_follows_most_heads():
    logits = torch.randn(3, V)
    for build in (llama, gpt2):
        assert AfterHead.of(build(V)) == AfterHead()
    assert AfterHead()(logits) is logits


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(head_dim=8, final_logit_softcapping=0.5, **LM)), (1.0, 0.5)),
        (lambda: hf.GraniteForCausalLM(hf.GraniteConfig(logits_scaling=4.0, **LM)), (0.25, None)),
        (lambda: hf.CohereForCausalLM(hf.CohereConfig(logit_scale=3.0, **LM)), (3.0, None)),
    ],
    ids=["Gemma-2", "Granite", "Cohere"],
)
def test_scale_and_soft_cap_are_read_from_the_configuration(model, expected):
    found = AfterHead.of(model())
    assert found.bias is None and (found.scale, found.soft_cap) == expected


def test_the_bias_is_the_buffer_that_the_model_has_now():
    model = bart(V, spread=10)
    assert torch.equal(AfterHead.of(model).bias, model.final_logits_bias)
    assert AfterHead.of(model.double()).bias.dtype == torch.float64


def test_bias_then_scale_then_soft_cap():
    logits, bias = torch.randn(3, V, dtype=torch.float64), torch.randn(1, V, dtype=torch.float64)
    found = AfterHead(bias, 2.0, 1.5)(logits)
    torch.testing.assert_close(found, 1.5 * ((logits + bias) * 2 / 1.5).tanh(), rtol=1e-12, atol=0)
