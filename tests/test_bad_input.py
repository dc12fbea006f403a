"""What is given wrong is refused early, by a message that names it and says what to do.

Other refusals are beside what they are of: test_trainer_refusals, test_heads, test_tasks, test_resume (torn
checkpoints), data/test_cifar100_hostile, data/test_market1501, data/test_glyphs, data/test_teacher_cache.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import labelled_images, labelled_tokens, llama, vit
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_dis import DISConfig, DISDistillationTrainer, DISLoss, SamplerSpec, cache_teacher_targets, make_sampler
from hf_dis.cache.header import HEADER, CacheHeader
from hf_dis.data import DataError, load_cifar100, load_glyphs, load_market1501
from hf_dis.data.glyphs import matplotlib_fonts
from hf_dis.teacher.loading import load_teacher

NAN, INF = float("nan"), float("inf")

# Configuration: field, value, error, what the message says it has to be.
CONFIG = [
    ("temperature", 0.0, ValueError, "above 0"),
    ("temperature", -2.0, ValueError, "above 0"),
    ("temperature", NAN, ValueError, "above 0"),
    ("temperature", INF, ValueError, "above 0 and finite"),
    ("temperature", "2", TypeError, "a number"),
    ("temperature", None, TypeError, "a number"),
    ("hard_label_weight", -0.01, ValueError, "within"),
    ("hard_label_weight", 1.01, ValueError, "within"),
    ("hard_label_weight", "half", TypeError, "a number"),
    ("num_sampled_classes", 0, ValueError, "1 or more"),
    ("num_sampled_classes", -3, ValueError, "1 or more"),
    ("num_sampled_classes", 2.5, TypeError, "a whole number"),
    ("num_sampled_classes", "8", TypeError, "a whole number"),
    ("num_sampled_classes", True, TypeError, "a whole number"),
    ("num_shared_classes", -1, ValueError, "0 or more"),
    ("num_tails", 0, ValueError, "1 or more"),
    ("num_tails", 1.5, TypeError, "a whole number"),
    ("num_updated_classes", 0, ValueError, "1 or more"),
    ("num_updated_classes", 1.5, TypeError, "a whole number"),
    ("num_updated_classes", 8, ValueError, "row_sparse_head=True"),
    ("rank_depth", 0, ValueError, "1 or more"),
    ("rank_depth", 1.5, TypeError, "a whole number"),
    ("proposal_floor", 0.0, ValueError, "0.05 is usual"),
    ("proposal_floor", 1.1, ValueError, "0.05 is usual"),
    ("proposal_floor", NAN, ValueError, "0.05 is usual"),
    ("proposal_decay", -0.1, ValueError, "0.95 is usual"),
    ("proposal_decay", 1.0, ValueError, "0.95 is usual"),
    ("probe_steps", -1, ValueError, "never"),
    ("probe_steps", 0.5, TypeError, "a whole number"),
    ("head_learning_rate", -1e-3, ValueError, "None for learning_rate"),
    ("head_learning_rate", "fast", TypeError, "a number"),
    ("proposal", "laplace", ValueError, "one of dis, teacher"),
    ("proposal", None, ValueError, "one of dis, teacher"),
    ("design", "poisson", ValueError, "one of pps, replacement"),
    ("head_mode", "fast", ValueError, "one of auto, sampled, exact"),
]


@pytest.mark.parametrize(("name", "value", "error", "expected"), CONFIG, ids=[f"{n}={v!r}" for n, v, *_ in CONFIG])
def test_configuration(tmp_path, name, value, error, expected):
    with pytest.raises(error) as refused:
        DISConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    told = str(refused.value)
    assert told.startswith(f"{name} is {value!r}") and "it has to be" in told and expected in told


def loss(features=(4, 8), weight=(20, 8), bias=None, teacher=(4, 20), labels=None, **keywords):
    """A call of DISLoss with tensors of these shapes."""
    tensors = [torch.randn(shape) for shape in (features, weight)]
    bias = None if bias is None else torch.randn(bias)
    sampler = make_sampler(20, SamplerSpec(num_sampled_classes=5))
    return DISLoss(sampler, **keywords)(*tensors, bias, torch.randn(teacher), labels)


def long(*values):
    return torch.tensor(values, dtype=torch.long)


LOSS = {
    "classes of the sampler": (lambda: make_sampler(0), ValueError, "num_classes is 0", "1 or more"),
    "kind of classes": (lambda: make_sampler(10.0), TypeError, "num_classes is 10.0", "a whole number"),
    "temperature": (lambda: loss(temperature=0), ValueError, "temperature is 0", "above 0"),
    "share": (lambda: loss(hard_label_weight=2), ValueError, "hard_label_weight is 2", "within"),
    "features of sequences": (lambda: loss((2, 2, 8)), ValueError, "(2, 2, 8)", "[N, 8]"),
    "width": (lambda: loss((4, 7)), ValueError, "(4, 7)", "[N, 8]"),
    "classes of the head": (lambda: loss(weight=(21, 8)), ValueError, "has 21", "made for 20"),
    "bias": (lambda: loss(bias=(7,)), ValueError, "(7,)", "[20]"),
    "items of the teacher": (lambda: loss(teacher=(3, 20)), ValueError, "(3, 20)", "[4, 20]"),
    "classes of the teacher": (lambda: loss(teacher=(4, 21)), ValueError, "21 classes", "trained on"),
    "one item": (lambda: loss(teacher=(20,)), ValueError, "(20,)", "[4, 20]"),
    "number of labels": (lambda: loss(labels=long(1, 2, 3)), ValueError, "(3,)", "[4]"),
    "shape of labels": (lambda: loss(labels=long([1], [2], [3], [4])), ValueError, "(4, 1)", "[4]"),
    "kind of labels": (lambda: loss(labels=torch.rand(4)), ValueError, "torch.float32", "class ids"),
    "range of labels": (lambda: loss(labels=long(1, 2, 3, 20)), ValueError, "[20]", "0..19"),
}


@pytest.mark.parametrize(("call", "error", "value", "remedy"), LOSS.values(), ids=LOSS)
def test_a_loop_of_ones_own(call, error, value, remedy):
    with pytest.raises(error) as refused:
        call()
    assert value in str(refused.value) and remedy in str(refused.value)


def test_no_rows_are_no_error_and_no_gradient():
    features = torch.randn(0, 8, requires_grad=True)
    value = DISLoss(make_sampler(20, SamplerSpec(num_sampled_classes=5)))(
        features, torch.randn(20, 8), None, torch.randn(0, 20)
    )
    value.backward()
    assert float(value.detach()) == 0 and features.grad.shape == (0, 8)


# Trainers: student, teacher, data


def changed(**columns):
    return [{**item, **columns} for item in labelled_images(8, 40)]


TRAINERS = {
    "a number as teacher": ({"teacher": 3}, TypeError, "teacher_model is a int", "name or path"),
    "a state dict as teacher": ({"teacher": {"a": 1}}, TypeError, "teacher_model is a dict", "torch.nn.Module"),
    "a path as teacher": ({"teacher": Path("t")}, TypeError, "Path", "as a string"),
    "a folder that is not there": ({"teacher": "/no/where"}, OSError, "'/no/where'", "a folder with a checkpoint"),
    "a name out of reach": ({"teacher": "no-one/no-model"}, OSError, "'no-one/no-model'", "within reach"),
    "another task": ({"teacher": llama(40)}, ValueError, "LlamaForCausalLM", "have to be of one kind"),
    "sharding left out on CPU": ({"fsdp": True}, ValueError, "fsdp is set, and so is use_cpu", "of them"),
    "labels that are no ids": ({"train_dataset": changed(labels=1.5)}, ValueError, "torch.float32", "class ids"),
    "labels one-hot": ({"train_dataset": changed(labels=torch.zeros(40))}, ValueError, "(8, 40)", "one class id"),
    "labels too large": ({"train_dataset": changed(labels=99)}, ValueError, "[99]", "check num_labels"),
    "images of NaN": (
        {"train_dataset": changed(pixel_values=torch.full((3, 8, 8), NAN))},
        FloatingPointError,
        "ViTForImageClassification answers NaN or Inf",
        "check these inputs",
    ),
}


@pytest.mark.parametrize(("given", "error", "value", "remedy"), TRAINERS.values(), ids=TRAINERS)
def test_models_and_data(make_trainer, given, error, value, remedy):
    with pytest.raises(error) as refused:
        make_trainer(**given).train()
    assert value in str(refused.value) and remedy in str(refused.value)


def test_labels_of_tokens_for_other_tokens(tmp_path):
    items = labelled_tokens(8, 40)
    for item in items:
        item["labels"] = item["labels"][:-1]
    args = DISConfig(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=r"labels have shape \(8, 5\) for tokens of shape \(8, 6\).*-100"):
        DISDistillationTrainer(llama(40), llama(40, seed=1), args, train_dataset=items).train()


def test_an_empty_folder_as_teacher(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path}.*config.json"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize(
    ("items", "weight"),
    [(changed(labels="cat"), 0.25), ([{"pixel_values": item["pixel_values"]} for item in changed()], 0.35)],
)
def test_labels_that_never_arrive_are_told_once(make_trainer, caplog, items, weight):
    """The default collator drops a column of strings; the teacher alone is then learnt from."""
    trainer = make_trainer(train_dataset=items, hard_label_weight=weight, max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (told,) = [record.message for record in caplog.records if "no labels" in record.message]
    assert f"hard_label_weight={weight} has no effect" in told and "'labels'" in told


# Caches of a teacher's targets


def words(*tokens):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=tokens[0])))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Four shards of a teacher's targets about 32 images of 40 named classes."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    teacher = vit(40, seed=1, spread=30, id2label={number: f"class {number}" for number in range(40)})
    settings = {"depth": 6, "sample_size": 8, "shard_examples": 8, "show_progress": False}
    cache_teacher_targets(teacher, labelled_images(32, 40), folder, processing_class=words("a", "b"), **settings)
    return folder


def edited(name, edit):
    """Replaces what is in a file of the cache."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def removed(name):
    return lambda folder: (folder / name).unlink()


def unfinished(folder):
    """As it is while its last shard is being written."""
    (folder / "shard-000003.arrow").unlink()
    header = dataclasses.replace(CacheHeader.load(folder), shards=[])
    (folder / HEADER).write_text(header.to_json())


OTHER_LABELS = {"id2label": {number: f"other {number}" for number in range(40)}}
FLIPPED = edited("shard-000001.arrow", lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
AS_IT_IS = edited(HEADER, lambda content: content)

# What is done to the folder, what the trainer is given besides, error, value, remedy.
CACHES = {
    "another C": (AS_IT_IS, {"student": vit(41)}, ValueError, "the cache has 40, the student 41", "write another"),
    "other labels": (
        AS_IT_IS,
        {"student": vit(40, **OTHER_LABELS)},
        ValueError,
        "label names: id2label",
        "write another",
    ),
    "another tokenizer": (AS_IT_IS, {"processing_class": words("a", "c")}, ValueError, "tokenizer", "write another"),
    "another temperature": (AS_IT_IS, {"temperature": 3.0}, ValueError, "has 2, the training 3", "write another"),
    "another data set": (
        AS_IT_IS,
        {"train_dataset": labelled_images(32, 40, seed=3)},
        DataError,
        "16 of 16 examples are not in the cache",
        "Train on the same data set",
    ),
    "another depth": (AS_IT_IS, {"rank_depth": 5}, ValueError, "rank_depth is 5", "None or 6"),
    "a proposal without its sums": (AS_IT_IS, {"proposal": "topk"}, ValueError, "proposal is 'topk'", "another"),
    "a flipped byte": (FLIPPED, {}, DataError, "shard-000001.arrow is damaged", "Copy it again"),
    "a shard cut short": (
        edited("shard-000002.arrow", lambda content: content[:-100]),
        {},
        DataError,
        "shard-000002.arrow is damaged",
        "Copy it again",
    ),
    "a missing shard": (removed("shard-000002.arrow"), {}, DataError, "shard-000002.arrow", "missing: copy it again"),
    "a missing header": (removed(HEADER), {}, DataError, f"has no {HEADER}", "cache_teacher_targets"),
    "a damaged header": (edited(HEADER, lambda content: content[:-20]), {}, DataError, HEADER, "copy it again"),
    "a header of another make": (
        edited(HEADER, lambda _: b"{}"),
        {},
        DataError,
        "is damaged ('format')",
        "copy it again",
    ),
    "an edited header": (
        edited(HEADER, lambda content: content.replace(b'"temperature": 2.0', b'"temperature": 3.0')),
        {"temperature": 3.0},
        DataError,
        "checksum",
        "write the cache again",
    ),
    "a newer format": (
        edited(HEADER, lambda content: content.replace(b'"version": 1', b'"version": 2')),
        {},
        DataError,
        "in format 2",
        "upgrade hf_dis",
    ),
    "half-written": (unfinished, {}, DataError, "3 of 4 shards are there", "Run what wrote it again"),
}


@pytest.mark.parametrize(("alter", "given", "error", "value", "remedy"), CACHES.values(), ids=CACHES)
def test_caches(make_trainer, written, tmp_path, alter, given, error, value, remedy):
    folder = shutil.copytree(written, tmp_path / "cache")
    alter(folder)
    given = {"processing_class": words("a", "b"), "data_collator": default_data_collator, "rank_depth": None, **given}
    with pytest.raises(error) as refused:
        make_trainer(teacher_cache=folder, **{"train_dataset": labelled_images(32, 40), **given}).train()
    assert value in str(refused.value) and remedy in str(refused.value)


def test_the_cache_of_the_table_is_a_good_one(make_trainer, written):
    make_trainer(teacher_cache=written, rank_depth=None, max_steps=1).train()


# Checkpoints and data sets


def torn_checkpoint(make, folder):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "output_dir": str(folder)}
    make(**settings).train()
    (folder / "checkpoint-1" / "optimizer.pt").unlink()
    make(**settings).train(resume_from_checkpoint=str(folder / "checkpoint-1"))


def page_as(name, load):
    """Loads a page in the place of an archive or a font."""

    def call(make, folder):
        (folder / name).write_bytes(b"<html>404</html>")
        load(folder / name)

    return call


def part_as(name, load):
    """Loads an extracted folder of which only a part is there."""

    def call(make, folder):
        (folder / name).mkdir(parents=True)
        (folder / name / "meta").write_bytes(b"")
        load(folder)

    return call


FILES = {
    "a checkpoint that is not there": (
        lambda make, folder: make().train(resume_from_checkpoint="/no/checkpoint-3"),
        ValueError,
        "/no/checkpoint-3",
        "start without",
    ),
    "a file as checkpoint": (
        lambda make, folder: make().train(resume_from_checkpoint=__file__),
        ValueError,
        __file__,
        "start without",
    ),
    "nothing to resume": (
        lambda make, folder: make().train(resume_from_checkpoint=True),
        ValueError,
        "no whole checkpoint in",
        "start without",
    ),
    "a torn checkpoint": (torn_checkpoint, ValueError, "optimizer.pt is missing", "start without"),
    "an archive that is not there": (
        lambda make, folder: load_cifar100("/no/where"),
        DataError,
        "/no/where",
        "--data_dir",
    ),
    "another archive": (page_as("cifar.tar.gz", load_cifar100), DataError, "has the md5 checksum", "Download"),
    "part of an archive's folder": (
        part_as("cifar-100-python", load_cifar100),
        DataError,
        "no train, test",
        "Download",
    ),
    "a page as archive": (page_as("market.zip", load_market1501), DataError, "market.zip cannot be read", "Download"),
    "an archive's folder without a split": (
        part_as("Market-1501-v15.09.15/query", load_market1501),
        DataError,
        "bounding_box_train",
        "Download",
    ),
    "a font that is not there": (
        lambda make, folder: load_glyphs(["/no.ttf"]),
        DataError,
        "/no.ttf",
        "check font_files",
    ),
    "a page as font": (
        page_as("font.ttf", lambda path: load_glyphs([path, *matplotlib_fonts()])),
        DataError,
        "font.ttf",
        "font_files",
    ),
    "one font": (
        lambda make, folder: load_glyphs([__file__], test_faces=["test_bad_input"]),
        DataError,
        "every face",
        "leaves none",
    ),
}


@pytest.mark.parametrize(("call", "error", "value", "remedy"), FILES.values(), ids=FILES)
def test_files(make_trainer, tmp_path, call, error, value, remedy):
    with pytest.raises(error) as refused:
        call(make_trainer, tmp_path)
    assert value in str(refused.value) and remedy in str(refused.value)


def test_there_are_many():
    assert len(CONFIG) + len(LOSS) + len(TRAINERS) + len(CACHES) + len(FILES) >= 80


def test_a_student_that_answers_inf_is_not_taken_for_another_head(make_trainer):
    student = vit(40)
    with torch.no_grad():
        student.classifier.bias[3] = -INF
    with pytest.raises(FloatingPointError, match="classes that the model masks"):
        make_trainer(student).train()
