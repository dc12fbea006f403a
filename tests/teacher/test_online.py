"""The teacher's ranked answers, chunk by chunk, and what is wrong with a teacher's answers."""

import copy
from types import SimpleNamespace

import accelerate
import pytest
import torch
from tiny_models import bart, bert_mlm, gpt2, images, llama, resnet, spread_out, t5, tokens, vit
from torch import nn

from hf_dis.items import Items
from hf_dis.teacher.online import OnlineTeacher
from hf_dis.teacher.targets import TeacherTargets


class Echo(nn.Module):
    """A teacher whose logits are its input."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.chunks = []

    def forward(self, logits, **others):
        self.chunks.append(len(logits))
        return SimpleNamespace(logits=self.dropout(logits * self.scale))


@pytest.mark.parametrize("chunk_items", [1, 3, 10, 99])
def test_chunks_join_to_the_targets_of_the_whole_batch(chunk_items):
    logits, model = torch.randn(10, 12), Echo()
    teacher = OnlineTeacher(model, 12, 2.0, 5, chunk_items=chunk_items)
    chunks = list(teacher({"logits": logits}, Items(len(logits))))
    whole = TeacherTargets(logits, 2.0, 5)
    assert max(model.chunks) <= chunk_items and sum(model.chunks) == 10
    assert torch.equal(torch.cat([chunk.ids for chunk in chunks]), whole.ids)
    torch.testing.assert_close(torch.cat([chunk.log_probs for chunk in chunks]), whole.log_probs)


def test_a_chunk_is_asked_for_only_when_it_is_needed():
    model = Echo()
    answers = OnlineTeacher(model, 12, 2.0, 5, chunk_items=2)({"logits": torch.randn(10, 12)}, Items(10))
    next(answers)
    assert model.chunks == [2]


def test_chunks_fit_the_budget_of_elements(monkeypatch):
    monkeypatch.setattr("hf_dis.teacher.targets.CHUNK_ELEMENTS", 100)
    cpu = torch.device("cpu")
    assert OnlineTeacher(Echo(), 12, 2.0, 5).stream.items_of_chunk(99, cpu) == 8
    assert OnlineTeacher(Echo(), 1_000, 2.0, 5).stream.items_of_chunk(99, cpu) == 1


def test_the_teacher_is_in_evaluation_mode_and_frozen():
    model = resnet(9).train()
    teacher = OnlineTeacher(model, 9, 2.0, 5)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = next(teacher.all_classes({"pixel_values": images(4, 32)}, Items(4)))
    assert not logits.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_finite_logits_whose_sum_is_not_are_taken():
    logits = torch.full((3, 12), 3e38)
    assert torch.equal(
        next(OnlineTeacher(Echo(), 12, 2.0, 5).all_classes({"logits": logits}, Items(len(logits)))), logits
    )


def test_infinities_that_cancel_are_found():
    logits = torch.zeros(3, 12)
    logits[1, 2], logits[1, 3] = torch.inf, -torch.inf
    with pytest.raises(FloatingPointError, match=r"items \[1\]"):
        next(OnlineTeacher(Echo(), 12, 2.0, 5).all_classes({"logits": logits}, Items(len(logits))))


@pytest.mark.parametrize("column", [3, 11], ids=["shared", "of the teacher alone"])
def test_every_output_of_a_ranked_teacher_is_checked(column):
    model = vit(12)
    with torch.no_grad():
        model.classifier.bias[column] = torch.nan
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in items \[0, 1\]"):
        next(OnlineTeacher(model, 11, 2.0, 5)({"pixel_values": images(2, 8)}, Items(2)))


def test_masked_classes_are_taken_and_an_item_without_any_class_is_not():
    logits = torch.randn(3, 12)
    logits[:, 4:] = -torch.inf
    assert torch.equal(next(OnlineTeacher(Echo(), 12, 2.0, 5).all_classes({"logits": logits}, Items(3))), logits)
    logits[2] = -torch.inf
    with pytest.raises(FloatingPointError, match=r"items \[2\] of the batch, or are -inf for all classes"):
        next(OnlineTeacher(Echo(), 12, 2.0, 5).all_classes({"logits": logits}, Items(3)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_items_with_nan_or_inf_are_named(bad):
    """Items 6 and 9 of a batch in chunks of 4: they are in the second and the third."""
    logits = torch.randn(10, 12)
    logits[6, 3] = logits[9, 0] = bad
    teacher = OnlineTeacher(Echo(), 12, 2.0, 5, chunk_items=4)
    answers = teacher({"logits": logits}, Items(10))
    next(answers)
    with pytest.raises(FloatingPointError, match=r"NaN or Inf in items \[6\] of the batch.*bfloat16"):
        next(answers)
    whole = OnlineTeacher(Echo(), 12, 2.0, 5)
    with pytest.raises(FloatingPointError, match=r"items \[6, 9\]"):
        list(whole({"logits": logits}, Items(10)))
    assert len(list(teacher({"logits": logits}, Items(10), check_values=False))) == 3


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"logits of 12 classes, the student of 13.*teacher trained on"):
        list(OnlineTeacher(Echo(), 13, 2.0, 5)({"logits": torch.randn(4, 12)}, Items(4)))


# The fingerprint

KINDS = {"ViT": vit, "ResNet": resnet, "Llama": llama, "GPT-2": gpt2, "BERT": bert_mlm, "T5": t5, "Bart": bart}
CPU = torch.device("cpu")


def fingerprint(model):
    return OnlineTeacher(model, 12, 2.0, 5).fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_that_of_the_weights(kind, dtype):
    model = KINDS[kind](12).to(dtype)
    found = fingerprint(model)
    assert len(found) == 16 and found == fingerprint(copy.deepcopy(model)) == fingerprint(KINDS[kind](12).to(dtype))
    assert found != fingerprint(KINDS[kind](12, seed=1).to(dtype))
    assert found != fingerprint(spread_out(KINDS[kind](12), 2).to(dtype))


def test_teachers_without_weights_or_with_whole_numbers_have_one_too():
    model = Echo()
    model.register_buffer("table", torch.arange(5, dtype=torch.uint8))
    assert len(fingerprint(model)) == len(fingerprint(nn.Identity())) == 16
    other = copy.deepcopy(model)
    other.table[3] = 0
    assert fingerprint(model) != fingerprint(other)


@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_teacher_has_the_fingerprint_of_its_values(kind, tmp_path):
    expected = fingerprint(KINDS[kind](12))
    assert fingerprint(accelerate.cpu_offload(KINDS[kind](12), CPU)) == expected
    assert fingerprint(accelerate.disk_offload(KINDS[kind](12), str(tmp_path), CPU)) == expected
    assert fingerprint(accelerate.cpu_offload(KINDS[kind](12, seed=1), CPU)) != expected


def test_weights_out_of_reach_are_told_apart_by_shape_and_type():
    with torch.device("meta"):
        models = [nn.Linear(3, 12), nn.Linear(4, 12), nn.Linear(3, 12, dtype=torch.float64)]
    assert len({fingerprint(model) for model in models}) == 3


@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "BERT"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["on CPU", "on disk"])
def test_an_offloaded_teacher_ranks_as_the_teacher_in_memory(kind, on_disk, tmp_path):
    inputs = tokens(5, 12)
    items = Items(5, positions=torch.arange(0, 30, 2), length=6)
    expected = list(OnlineTeacher(KINDS[kind](12, spread=10), 12, 2.0, 5, chunk_items=4)(inputs, items))
    model = KINDS[kind](12, spread=10)
    model = accelerate.disk_offload(model, str(tmp_path), CPU) if on_disk else accelerate.cpu_offload(model, CPU)
    teacher = OnlineTeacher(model, 12, 2.0, 5, chunk_items=4)
    before = teacher.fingerprint
    for _ in range(2):
        found = list(teacher(inputs, items))
        assert [len(chunk) for chunk in found] == [4, 4, 4, 3]  # the head is applied to chunks of items
        for chunk, other in zip(found, expected, strict=True):
            assert torch.equal(chunk.ids, other.ids)
            torch.testing.assert_close(chunk.log_probs, other.log_probs)
    assert fingerprint(model) == before
