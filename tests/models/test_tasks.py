"""What kind of model it is, and which classes two models share."""

import pytest
import transformers as hf
from tiny_models import bart, bert_mlm, bert_sequences, bert_tokens, gpt2, llama, llama_sequences, resnet, t5, vit
from tokenizers import Tokenizer, models
from torch import nn

from hf_dis.models.tasks import Task, find_task, num_outputs
from hf_dis.models.vocabulary import common_tokens, shared_classes

FOUND = {
    vit: Task.CLASSIFICATION,
    resnet: Task.CLASSIFICATION,
    bert_sequences: Task.CLASSIFICATION,
    llama_sequences: Task.CLASSIFICATION,
    bert_tokens: Task.TOKEN_CLASSIFICATION,
    bert_mlm: Task.MASKED_LM,
    gpt2: Task.CAUSAL_LM,
    llama: Task.CAUSAL_LM,
    t5: Task.SEQ2SEQ_LM,
    bart: Task.SEQ2SEQ_LM,
}


@pytest.mark.parametrize("build", FOUND)
def test_the_task_is_found_by_the_class(build):
    model = build(50)
    assert find_task(model) is FOUND[build]
    assert num_outputs(model, FOUND[build]) == 50


def test_a_class_of_ones_own():
    class Mine(hf.GPT2LMHeadModel):
        pass

    assert find_task(Mine(gpt2(50).config)) is Task.CAUSAL_LM


def test_inside_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(50), peft.LoraConfig(target_modules=["q_proj"]))
    assert find_task(model) is Task.CAUSAL_LM and num_outputs(model, Task.CAUSAL_LM) == 50


def test_an_unknown_task():
    with pytest.raises(ValueError, match=r"task of BertForQuestionAnswering is not known.*causal language model"):
        find_task(hf.BertForQuestionAnswering(bert_mlm(50).config))


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
    with pytest.raises(ValueError, match=r"64 items, the student's 50.*processing_class.*teacher_processing_class"):
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
