"""The task of a model, and the items of its batches."""

import pytest
import torch
import transformers as hf
from tiny_models import bart, bert_mlm, bert_sequences, bert_tokens, gpt2, llama, llama_sequences, resnet, t5, vit
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_dis.models.tasks import Task, find_items, find_task, num_outputs, split_labels

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


@pytest.mark.parametrize("config", [{"problem_type": "regression"}, {"problem_type": "multi_label_classification"}])
def test_only_classifiers_of_one_label_per_example(config):
    with pytest.raises(ValueError, match=r"problem_type is '.*' and num_labels is 40.*ViT.*single-label"):
        num_outputs(vit(40, **config), Task.CLASSIFICATION)


# Items

TEXT_TASKS = [task for task in Task if task.has_token_items]


def column(task, name):
    return f"decoder_{name}" if task is Task.SEQ2SEQ_LM else name


@pytest.mark.parametrize("task", TEXT_TASKS)
@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
def test_without_labels_and_mask_the_positions_are_on_the_device_of_the_batch(task, name):
    ids = torch.ones(2, 4, dtype=torch.long, device="meta")
    inputs = {column(task, name): ids if name == "input_ids" else torch.ones(2, 4, 8, device="meta")}
    items = find_items(task, inputs, None)
    assert items.positions.device.type == "meta" and len(items) == 8 and items.labels is None


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_unlabelled_items_of_an_accelerator_mix_no_devices(task):
    with FakeTensorMode():
        ids = torch.ones(2, 4, dtype=torch.long, device="cuda")
        items = find_items(task, {column(task, "input_ids"): ids}, None)
        assert items.of(torch.zeros(2, 4, 5, device="cuda")).shape == (8, 5)
        assert items.sums_by_example(torch.ones(8, device="cuda")).device.type == "cuda"


def test_an_unlabelled_sequence_to_sequence_batch_has_the_items_of_its_decoder():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = {"input_ids": torch.ones(2, 5), "decoder_input_ids": torch.ones(2, 3), "decoder_attention_mask": mask}
    items, given = split_labels(t5(50), Task.SEQ2SEQ_LM, inputs)
    assert items.positions.tolist() == [0, 1, 3] and items.length == 3 and given.keys() == inputs.keys()


@pytest.mark.parametrize("build", [t5, bart])
def test_a_sequence_to_sequence_batch_of_neither_labels_nor_decoder_tokens(build):
    inputs = {"input_ids": torch.ones(2, 5), "attention_mask": torch.ones(2, 5), "decoder_input_ids": None}
    message = r"holds input_ids, attention_mask, .*no labels.*decoder_input_ids or decoder_inputs_embeds.*collator add"
    with pytest.raises(ValueError, match=message):
        split_labels(build(50), Task.SEQ2SEQ_LM, inputs)
    with pytest.raises(ValueError, match=message):
        find_items(Task.SEQ2SEQ_LM, inputs, None)


@pytest.mark.parametrize("build", [t5, bart])
def test_decoder_inputs_are_made_from_labels(build):
    model, labels = build(50), torch.tensor([[5, 6, 7], [8, 9, -100]])
    items, inputs = split_labels(model, Task.SEQ2SEQ_LM, {"input_ids": torch.ones(2, 5), "labels": labels})
    assert items.labels.tolist() == [5, 6, 7, 8, 9] and items.positions.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(inputs["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(labels=labels))
    assert inputs.keys() == {"input_ids", "decoder_input_ids"}


def test_examples_are_the_items_of_a_classifier():
    labels = torch.tensor([3, 4])
    items, inputs = split_labels(vit(40), Task.CLASSIFICATION, {"pixel_values": torch.ones(2, 3), "labels": labels})
    assert len(items) == 2 and items.labels is labels and items.positions is None and "labels" not in inputs
    assert len(find_items(Task.CLASSIFICATION, {"pixel_values": torch.ones(5, 3)}, None)) == 5
    with pytest.raises(ValueError, match=r"labels have shape \(2, 1\): a classification model has one class id per"):
        find_items(Task.CLASSIFICATION, {}, labels[:, None])


def test_labels_of_other_names_are_not_given_to_the_model():
    batch = {"pixel_values": torch.ones(2, 3), "labels": torch.tensor([3, 4]), "weights": torch.ones(2)}
    _, inputs = split_labels(vit(40), Task.CLASSIFICATION, batch, ("labels", "weights"))
    assert inputs.keys() == {"pixel_values"}
