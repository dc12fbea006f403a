"""The teacher is a model of its own: its inputs, its weights where they are offloaded, and its own parameters."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, disk_offload
from datasets import Dataset
from tiny_models import assert_near, bert_sequences, images, labelled_tokens, llama, vit

from hf_dis.trainer.manifest import MANIFEST

SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}


def fingerprint_in(trainer):
    manifest = Path(trainer.args.output_dir) / "checkpoint-2" / MANIFEST
    return json.loads(manifest.read_text())["teacher"]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("build", [vit, llama])
def test_an_offloaded_teacher_is_the_one_in_memory(make_trainer, tmp_path, build, where):
    """Two steps and a checkpoint, whose manifest has the fingerprint of the teacher's weights."""
    data = {"train_dataset": labelled_tokens(16, 40)} if build is llama else {}
    results = []
    for is_offloaded in (False, True):
        teacher = build(40, seed=1, spread=30)
        if is_offloaded and where == "memory":
            cpu_offload(teacher, execution_device=torch.device("cpu"))
        elif is_offloaded:
            disk_offload(teacher, tmp_path / "offloaded", execution_device=torch.device("cpu"))
        assert any(parameter.is_meta for parameter in teacher.parameters()) == is_offloaded
        trainer = make_trainer(build(40), teacher, **SAVING, **data)
        trainer.train()
        results.append((fingerprint_in(trainer), trainer.model.state_dict()))
    assert results[0][0] == results[1][0]
    assert_near(results[1][1], results[0][1], tolerance=0)


# Columns


def distilbert(num_labels, seed=0):
    torch.manual_seed(seed)
    config = hf.DistilBertConfig(
        vocab_size=50,
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=32,
        max_position_embeddings=64,
        num_labels=num_labels,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    )
    return hf.DistilBertForSequenceClassification(config)


def text_pairs(num_items):
    """Examples as a tokenizer makes them of pairs of texts, with a column that no model takes."""
    items = labelled_tokens(num_items, 50)
    segments = torch.tensor([0, 0, 0, 1, 1, 1])
    return [
        {**item, "token_type_ids": segments, "labels": number % 40, "idx": number} for number, item in enumerate(items)
    ]


def columns_of(model):
    """Notes the names of what a model is given."""
    given = []
    model.register_forward_pre_hook(lambda module, args, named: given.append(set(named)), with_kwargs=True)
    return given


@pytest.mark.parametrize("kind", ["datasets", "list"])
@pytest.mark.parametrize("teacher_is_bert", [True, False])
def test_each_model_is_given_the_columns_of_its_own_forward(make_trainer, kind, teacher_is_bert):
    student, teacher = distilbert(40), bert_sequences(40, seed=1, spread=30)
    if not teacher_is_bert:
        student, teacher = bert_sequences(40), distilbert(40, seed=1)
    mine, theirs = columns_of(student), columns_of(teacher)
    items = text_pairs(16)
    data = Dataset.from_list([{n: torch.as_tensor(v).tolist() for n, v in item.items()} for item in items])
    data = data if kind == "datasets" else items
    trainer = make_trainer(student, teacher, train_dataset=data, eval_dataset=data, remove_unused_columns=True)
    trainer.train()
    trainer.evaluate()
    trainer.predict(data)
    trainer.extract_features(data)
    common = {"input_ids", "attention_mask"}
    of_bert, of_distilbert = (theirs, mine) if teacher_is_bert else (mine, theirs)
    assert len(mine) >= 4 + 2 + 2 + 2 and len(theirs) >= 4 + 2 + 2
    assert all(names == common | {"token_type_ids"} for names in of_bert)
    assert all(names == common for names in of_distilbert)


def test_the_teachers_answer_is_that_to_both_texts(make_trainer, dense_kd):
    student, teacher, items = distilbert(40), bert_sequences(40, seed=1, spread=30), text_pairs(12)
    trainer = make_trainer(student, teacher, train_dataset=items, eval_dataset=items)
    found = trainer.evaluate()["eval_kd_loss"]
    batch = {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "attention_mask")}
    segments = torch.stack([item["token_type_ids"] for item in items])
    with torch.no_grad():
        logits, target = student.eval()(**batch).logits, teacher(**batch, token_type_ids=segments).logits
        without = teacher(**batch).logits
    assert found == pytest.approx(dense_kd(logits, target, 2.0).mean().item(), rel=1e-4)
    assert found != pytest.approx(dense_kd(logits, without, 2.0).mean().item(), rel=1e-3)


# Parameters


def test_a_teacher_that_shares_layers_with_the_student_is_refused(make_trainer):
    student, teacher = vit(40), vit(40, seed=1, spread=30)
    teacher.vit.embeddings = student.vit.embeddings
    with pytest.raises(ValueError, match=r"share 4 parameters \(vit.embeddings.cls_token, .*copy.deepcopy"):
        make_trainer(student, teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    teacher.vit.embeddings = copy.deepcopy(student.vit.embeddings)
    make_trainer(student, teacher, max_steps=1).train()
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_student_made_anew_that_shares_layers_with_the_teacher_is_refused(make_trainer):
    teacher, students = vit(40, seed=1, spread=30), []

    def init():
        students.append(vit(40))
        if len(students) > 1:
            students[-1].classifier = teacher.classifier
        return students[-1]

    trainer = make_trainer(teacher=teacher, model_init=init)
    with pytest.raises(ValueError, match=r"share 2 parameters \(classifier.weight, classifier.bias\)"):
        trainer.train()


def test_the_teacher_stays_as_it_was(make_trainer):
    teacher = vit(40, seed=1, spread=30)
    before, answer = copy.deepcopy(teacher.state_dict()), teacher.eval()(images(4)).logits
    make_trainer(teacher=teacher, probe_steps=2).train()
    assert_near(teacher.state_dict(), before, tolerance=0)
    assert torch.equal(teacher(images(4)).logits, answer)
