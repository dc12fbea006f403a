"""Wrong input is refused early, by a message that names the value, the expectation and the remedy.

Caches are in test_bad_caches; other refusals are tested in the folders of the modules that refuse.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from test_bad_caches import CACHES
from tiny_models import labelled_images, labelled_tokens, llama, vit

from hf_dis import DISConfig, DISDistillationTrainer, DISLoss, SamplerSpec, make_sampler
from hf_dis.data import DataError, load_cifar100, load_glyphs, load_market1501
from hf_dis.data.glyphs import matplotlib_fonts
from hf_dis.teacher.loading import load_teacher

NAN, INF = float("nan"), float("inf")

# Configuration: field, value, error, a part of the expectation in the message.
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
    ("divergence", "kl", ValueError, "one of forward_kl, reverse_kl, jsd, skew_kl"),
    ("divergence", None, ValueError, "one of forward_kl, reverse_kl, jsd, skew_kl"),
    ("jsd_beta", 0.5, ValueError, "set divergence='jsd' to use it"),
    ("jsd_beta", "half", TypeError, "a number"),
    ("skew_alpha", 0.1, ValueError, "set divergence='skew_kl' to use it"),
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
    ("moment_dtype", "float16", ValueError, "'float32', 'bfloat16' or None"),
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
    "divergence": (lambda: loss(divergence="kl"), ValueError, "divergence is 'kl'", "one of forward_kl"),
    "beta": (lambda: loss(divergence="jsd", jsd_beta=1.0), ValueError, "jsd_beta is 1.0", "'reverse_kl'"),
    "alpha": (lambda: loss(divergence="skew_kl", skew_alpha=0), ValueError, "skew_alpha is 0", "0.1 is usual"),
    "alpha of another": (lambda: loss(skew_alpha=0.1), ValueError, "skew_alpha is 0.1", "set divergence='skew_kl'"),
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


def test_no_items_are_no_error_and_no_gradient():
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
    "a name out of reach": ({"teacher": "no-one/no-model"}, OSError, "'no-one/no-model'", "a checkpoint on the Hub"),
    "another task": ({"teacher": llama(40)}, ValueError, "LlamaForCausalLM", "have to be of one kind"),
    "sharding left out on CPU": ({"fsdp": True}, ValueError, "fsdp and use_cpu are both set", "unset one of them"),
    "labels that are no ids": ({"train_dataset": changed(labels=1.5)}, ValueError, "torch.float32", "class ids"),
    "labels one-hot": ({"train_dataset": changed(labels=torch.zeros(40))}, ValueError, "(8, 40)", "one class id"),
    "labels too large": ({"train_dataset": changed(labels=99)}, ValueError, "[99]", "check num_labels"),
    "images of NaN": (
        {"train_dataset": changed(pixel_values=torch.full((3, 8, 8), NAN))},
        FloatingPointError,
        "ViTForImageClassification returns NaN or Inf",
        "Check these inputs",
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
    """The default collator drops a column of strings; the student then learns from the teacher alone."""
    trainer = make_trainer(train_dataset=items, hard_label_weight=weight, max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (told,) = [record.message for record in caplog.records if "no labels" in record.message]
    assert f"hard_label_weight={weight} has no effect" in told and "'labels'" in told


# Checkpoints and datasets


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
