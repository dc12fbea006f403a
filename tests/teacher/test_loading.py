"""Teachers: placed on the device of the training, separate from the student, loaded whole."""

import copy

import accelerate
import peft
import pytest
import torch
from tiny_models import gpt2, llama, patched_modules, resnet, vit
from torch import nn

from hf_dis.teacher.loading import check_separate, load_teacher, load_tokenizer, placed

META, CPU = torch.device("meta"), torch.device("cpu")


def devices(model):
    return {value.device.type for value in model.state_dict().values()}


@pytest.mark.parametrize("build", [vit, resnet, llama])
def test_a_teacher_is_moved_to_the_device_of_the_training(build):
    teacher = build(11)
    assert placed(teacher, META) is teacher and devices(teacher) == {"meta"}


def test_a_teacher_outside_transformers_is_moved_too():
    assert devices(placed(nn.Linear(3, 4), META)) == {"meta"}


def test_keys_and_values_are_not_kept():
    for build in (llama, gpt2):
        assert build(11).config.use_cache and not placed(build(11), CPU).config.use_cache


def test_a_quantised_teacher_stays_where_it_is():
    teacher = vit(11)
    teacher.is_quantized = True
    assert devices(placed(teacher, META)) == {"cpu"}


def test_a_teacher_with_a_device_map_stays_where_it_is():
    teacher = vit(11)
    teacher.hf_device_map = {"": "cpu"}
    assert devices(placed(teacher, META)) == {"cpu"}


@pytest.mark.parametrize("on_disk", [False, True], ids=["on CPU", "on disk"])
def test_an_offloaded_teacher_stays_where_it_is(on_disk, tmp_path):
    """accelerate sets no device map on it; its weights are nowhere, so they cannot be moved."""
    teacher = llama(11)
    if on_disk:
        accelerate.disk_offload(teacher, str(tmp_path), CPU)
    else:
        accelerate.cpu_offload(teacher, CPU)
    hooks = patched_modules(teacher)
    assert placed(teacher, CPU) is teacher and not teacher.config.use_cache
    assert patched_modules(teacher) == hooks and teacher.lm_head.weight.is_meta


# Separate


def test_models_of_their_own_are_separate():
    student = llama(11)
    check_separate(student, llama(11))
    check_separate(student, copy.deepcopy(student))


def test_a_shared_layer_is_refused_by_name():
    student, teacher = vit(11), vit(11, seed=1)
    teacher.classifier = student.classifier
    with pytest.raises(
        ValueError, match=r"share 2 parameters \(classifier.weight, classifier.bias\): .*copy.deepcopy"
    ):
        check_separate(student, teacher)


def test_a_shared_weight_under_other_names_is_refused():
    """A student with a teacher's embeddings, tied to the head of the one only."""
    student, teacher = llama(11), gpt2(11)
    student.lm_head.weight = teacher.transformer.wte.weight
    with pytest.raises(ValueError, match=r"share 1 parameters \(lm_head.weight\)"):
        check_separate(student, teacher)


def test_many_shared_parameters_are_counted():
    student = llama(11)
    number = len(list(student.parameters()))
    with pytest.raises(
        ValueError, match=rf"share {number} parameters \(model.embed_tokens.weight, .* and {number - 5} m"
    ):
        check_separate(student, student)


def test_a_student_of_adapters_on_its_teacher_is_refused():
    teacher = llama(11)
    student = peft.get_peft_model(teacher, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"share \d+ parameters \(base_model.model.model.embed_tokens.weight"):
        check_separate(student, teacher)


# Loading


def test_a_teacher_is_loaded_as_its_checkpoint_says(tmp_path):
    vit(11).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert type(teacher) is type(vit(11)) and devices(teacher) == {"cpu"}
    assert all(torch.equal(value, vit(11).state_dict()[name]) for name, value in teacher.state_dict().items())


def test_there_is_no_such_teacher(tmp_path):
    with pytest.raises(OSError, match=r"teacher '.*nothing' cannot be loaded: .*config.json.*Hub"):
        load_teacher(str(tmp_path / "nothing"))


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    vit(11).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)) is None
