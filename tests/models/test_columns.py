"""Columns of a batch that only one of two models takes."""

from types import SimpleNamespace

import peft
import pytest
import transformers as hf
from tiny_models import bert_sequences, llama, t5, vit
from torch import nn

from hf_dis.models.columns import forward_columns, separate_columns

C = 40


def distilbert():
    config = hf.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=C)
    return hf.DistilBertForSequenceClassification(config)


def test_a_column_of_the_teacher_alone():
    """BERT takes token_type_ids, DistilBERT does not."""
    only_student, only_teacher = separate_columns(distilbert(), bert_sequences(C))
    assert "token_type_ids" in only_teacher and "token_type_ids" not in only_student
    assert not {"input_ids", "attention_mask", "labels"} & (only_teacher | only_student)


def test_a_column_of_the_student_alone():
    only_student, only_teacher = separate_columns(bert_sequences(C), distilbert())
    assert "token_type_ids" in only_student and "token_type_ids" not in only_teacher


def test_models_of_one_kind_take_the_same_columns():
    for build in (vit, llama, t5):
        assert separate_columns(build(C), build(C, seed=1)) == (frozenset(), frozenset())


def test_adapters_hide_no_column():
    student = peft.get_peft_model(bert_sequences(C), peft.LoraConfig(target_modules=["query"]))
    assert forward_columns(student) == forward_columns(bert_sequences(C))
    assert "token_type_ids" in separate_columns(student, distilbert())[0]


class TakesAny(nn.Module):
    """A teacher outside transformers."""

    def forward(self, input_ids, extra=None, **inputs):
        return SimpleNamespace(logits=input_ids)


class Strict(nn.Module):
    def forward(self, input_ids, extra=None):
        return SimpleNamespace(logits=input_ids)


def test_a_teacher_that_takes_any_keyword_is_given_all_columns():
    assert forward_columns(TakesAny()) == {"input_ids", "extra"}
    assert separate_columns(bert_sequences(C), TakesAny()) == (frozenset(), {"extra"})


def test_a_teacher_outside_transformers_with_few_columns_is_given_no_other():
    only_student, only_teacher = separate_columns(bert_sequences(C), Strict())
    assert {"attention_mask", "token_type_ids"} <= only_student and only_teacher == {"extra"}


class Wrapped(hf.BertForSequenceClassification):
    """Names no column, and hands all of them on."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("is_student", [True, False])
def test_a_forward_of_ones_own_that_hands_on_its_keywords_is_given_all_columns(is_student):
    wrapped, plain = Wrapped(bert_sequences(C).config), distilbert()
    student, teacher = (wrapped, plain) if is_student else (plain, wrapped)
    only_student, only_teacher = separate_columns(student, teacher)
    assert only_student == frozenset() and only_teacher == frozenset()
