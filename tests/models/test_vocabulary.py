"""The classes that two models share."""

import pytest
import transformers as hf
from tiny_models import gpt2, llama, vit
from tokenizers import Tokenizer, models
from torch import nn

from hf_dis.models.vocabulary import common_tokens, shared_classes


def tokenizer(*tokens):
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="a")
        )
    )


def test_vocabularies_of_one_width():
    assert shared_classes(llama(50), gpt2(50)) == 50


def test_a_vocabulary_padded_further():
    same = tokenizer("a", "b", "c"), tokenizer("a", "b", "c")
    assert shared_classes(llama(50), llama(64), *same) == shared_classes(llama(64), llama(50), *same) == 50


def test_tokens_added_at_the_end_of_one_are_left_out():
    assert shared_classes(llama(50), llama(50), tokenizer("a", "b", "c"), tokenizer("a", "b", "c", "d")) == 3
    assert shared_classes(llama(50), llama(64), tokenizer("a", "b", "c", "d"), tokenizer("a", "b")) == 2


def test_another_width_without_tokenizers():
    with pytest.raises(ValueError, match=r"64 entries, the student's 50.*processing_class.*teacher_processing_class"):
        shared_classes(llama(50), llama(64), tokenizer("a"))


def test_tokenizers_that_differ():
    with pytest.raises(ValueError, match=r"of 3 ids 2 mean different tokens \(id 1 is 'b' and 'c'.*same family"):
        shared_classes(llama(50), llama(50), tokenizer("a", "b", "c"), tokenizer("a", "c", "b"))


def test_tokens_that_only_one_has_in_the_middle():
    theirs = tokenizer("a", "b", "c")
    ours = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "c": 2}, unk_token="a")))
    with pytest.raises(ValueError, match="id 1 is 'b' in the teacher's alone"):
        common_tokens(ours, theirs)
    assert common_tokens(theirs, theirs) == float("inf")


def test_a_teacher_that_is_no_transformers_model():
    assert shared_classes(vit(40), nn.Linear(3, 4)) == 40


def test_classifiers_need_the_same_number_of_classes():
    with pytest.raises(ValueError, match=r"the teacher has 41 classes, the student 40.*num_labels"):
        shared_classes(vit(40), vit(41))
    assert shared_classes(vit(40), vit(40)) == 40


def test_models_of_different_tasks():
    with pytest.raises(ValueError, match=r"teacher, a ViT.*is a classification, the student.* of one kind"):
        shared_classes(llama(50), vit(50))
