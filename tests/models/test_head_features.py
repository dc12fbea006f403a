"""The features that a head is given."""

import pytest
import torch
from tiny_models import images, llama, resnet, tokens
from torch import nn

from hf_dis.models.head_features import evaluating, head_features

C, N = 11, 3


def test_features_are_what_the_head_is_given():
    model, pixels = resnet(C, spread=10).double(), images(N, 32, dtype=torch.float64)
    head = model.classifier[1]
    model.train()
    features = head_features(model, head, {"pixel_values": pixels})
    assert model.training and not features.requires_grad
    model.eval()
    torch.testing.assert_close(head(features), model(pixel_values=pixels).logits)
    assert not head._forward_pre_hooks


def test_features_of_tokens():
    model = llama(C).eval()
    features = head_features(model, model.lm_head, tokens(N, C))
    torch.testing.assert_close(model.lm_head(features), model(**tokens(N, C)).logits)


def test_a_model_that_does_not_call_its_head():
    model = llama(C)
    model.unused = nn.Linear(16, C)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not call its output head, a Linear.*head_name"):
        head_features(model, model.unused, tokens(N, C))
    assert not model.unused._forward_pre_hooks


def test_evaluating_gives_each_module_its_own_mode_back():
    model = resnet(C).train()
    model.classifier.eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert model.training and not model.classifier.training


def test_a_model_in_evaluation_mode_is_not_touched():
    """A walk over the modules of a teacher that sets and resets each mode takes milliseconds per step."""

    class Counts(nn.Module):
        def train(self, mode=True):
            raise AssertionError("the mode was set")

    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    model.append(Counts())
    model[2].training = False
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    model[1].training = True  # by its user
    with pytest.raises(AssertionError, match="was set"), evaluating(model):
        pass
