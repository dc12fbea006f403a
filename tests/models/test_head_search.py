"""The output head is found by what the model says, by its width or by name, inside PEFT too, or nobody guesses."""

import peft
import pytest
import transformers as hf
from tiny_models import FAMILIES, SMALL, bert_mlm, llama, vit
from torch import nn

from hf_dis.models.head_search import find_head, find_head_layers, find_heads

C = 11


@pytest.mark.parametrize(
    ("family", "name"),
    [("ViT", "classifier"), ("ResNet", "classifier.1"), ("RegNet", "classifier.1"), ("Swin", "classifier")],
)
def test_the_head_is_the_only_linear_layer_with_c_outputs(family, name):
    build, _ = FAMILIES[family]
    assert find_head(build(C), C) == name


def test_a_model_that_names_its_head_is_believed():
    """A vocabulary as large as a hidden layer leaves several candidates."""
    assert find_head(bert_mlm(32), 32) == "cls.predictions.decoder"


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


# Two heads


def deit(num_labels):
    config = hf.DeiTConfig(image_size=8, patch_size=4, num_labels=num_labels, **SMALL)
    return hf.DeiTForImageClassificationWithTeacher(config)


def test_a_head_and_one_for_distillation_are_two_heads():
    assert find_heads(deit(C), C) == find_head_layers(deit(C), C) == ("cls_classifier", "distillation_classifier")
    with pytest.raises(ValueError, match="two output heads, cls_classifier and distillation_classifier"):
        find_head(deit(C), C)


def test_two_heads_can_be_named():
    names = "cls_classifier, distillation_classifier"
    assert find_heads(deit(32), 32, names) == ("cls_classifier", "distillation_classifier")  # 32: as other layers
    with pytest.raises(ValueError, match=r"head_name is 'distil', but DeiTForImageClassificationWithTeacher has no"):
        find_heads(deit(C), C, "cls_classifier,distil")


def test_two_layers_of_which_neither_is_beside_the_other_are_no_pair():
    config = hf.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=32)
    with pytest.raises(ValueError, match=r"candidates are \['distilbert.*lin1', 'classifier'\]"):
        find_heads(hf.DistilBertForSequenceClassification(config), 32)


# PEFT


def with_adapter(model, **config):
    return peft.get_peft_model(model, peft.LoraConfig(**config))


@pytest.mark.parametrize(
    ("model", "head", "layers"),
    [
        (with_adapter(vit(C), target_modules=["q_proj"]), "classifier", ["classifier"]),
        (
            with_adapter(vit(C), target_modules=["q_proj"], modules_to_save=["classifier"]),
            "classifier",
            ["classifier.modules_to_save.default"],
        ),
        (
            with_adapter(llama(C), target_modules=["q_proj", "lm_head"]),
            "lm_head",
            ["lm_head.base_layer", "lm_head.lora_B.default"],
        ),
    ],
    ids=["body", "modules_to_save", "head"],
)
def test_inside_peft_the_head_is_what_the_model_calls_and_its_layers_what_computes(model, head, layers):
    prefix = "base_model.model."
    for name in (None, head):  # a name is one of the model that PEFT was put around
        assert find_head(model, C, name) == prefix + head
        assert find_head_layers(model, C, name) == tuple(prefix + layer for layer in layers)


def test_only_active_adapters_count():
    model = with_adapter(llama(C), target_modules=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"]))
    model.set_adapter("other")
    assert find_head_layers(model, C)[1:] == ("base_model.model.lm_head.lora_B.other",)


def test_an_active_adapter_that_is_not_on_the_head_does_not_count():
    model = with_adapter(llama(C), target_modules=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert find_head_layers(model, C)[1:] == ("base_model.model.lm_head.lora_B.default",)


def test_an_adapter_without_a_peft_model_around_it_counts_too():
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), llama(C))
    assert find_head_layers(model, C) == ("lm_head.base_layer", "lm_head.lora_B.default")


def test_a_layer_that_is_not_linear_is_found_and_not_switched():
    class Table(nn.Module):
        out_features = C

    model = nn.Sequential(nn.Linear(2, 3), Table())
    assert find_head(model, C) == "1"
    with pytest.raises(ValueError, match=r"'1' is a .*Table.*has to be an nn.Linear.*head_mode='exact'"):
        find_head_layers(model, C)
