"""Writing caches: a stopped run continues, nothing is mixed or written over, and bad arguments are refused."""

import dataclasses
import json
import os

import pytest
import torch
from small_cache import ITEMS, SETTINGS, Augmented, C, shards, times
from tiny_models import labelled_images, labelled_tokens, llama, vit
from transformers import default_data_collator

from hf_dis import TeacherCache, cache_teacher_targets
from hf_dis.cache.header import HEADER, CacheHeader
from hf_dis.errors import DataError
from hf_dis.items import stored_items


def test_a_second_run_writes_nothing(cache, teacher):
    before = times(cache)
    cache_teacher_targets(teacher, labelled_images(ITEMS, C), cache, **SETTINGS)
    assert times(cache) == before


class Stop(Exception):
    """Stands for a kill."""


def stopping_after(teacher, forwards):
    left = [forwards]

    def hook(*_):
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return teacher.register_forward_pre_hook(hook)


def test_a_stopped_run_goes_on_and_gives_the_same_cache(whole, teacher, tmp_path):
    path, data = tmp_path / "cache", labelled_images(ITEMS, C)
    hook = stopping_after(teacher, 6)
    with pytest.raises(Stop):
        cache_teacher_targets(teacher, data, path, **SETTINGS)
    hook.remove()
    done = times(path)
    assert 1 <= len(done) < 5
    with pytest.raises(DataError, match=rf"half-written: {len(done)} of 5 shards.*Run cache_teacher_targets again"):
        TeacherCache(path)
    cache_teacher_targets(teacher, data, path, **SETTINGS)
    assert times(path).items() >= done.items()
    assert [file.read_bytes() for file in shards(path)] == [file.read_bytes() for file in shards(whole)]
    assert (path / HEADER).read_text() == (whole / HEADER).read_text()
    assert sorted(os.listdir(path)) == sorted(os.listdir(whole))


def test_a_half_written_file_is_written_again(cache, teacher):
    header = json.loads((cache / HEADER).read_text())
    first, second = (cache / shard["file"] for shard in header["shards"][:2])
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    second.unlink()
    before = times(cache)
    with pytest.raises(DataError, match="damaged"):
        TeacherCache(cache)
    cache_teacher_targets(teacher, labelled_images(ITEMS, C), cache, **SETTINGS)
    assert first.read_bytes() == content and len(TeacherCache(cache)) == ITEMS
    changed = {name for name, time in times(cache).items() if before.get(name) != time}
    assert changed == {first.name, second.name}


@pytest.mark.parametrize("damage", ["", "[]", '{"file": "shard-000000.arrow"}', "\xff", '{"file": "../x"}'])
def test_a_damaged_note_beside_a_shard_has_it_written_again(cache, teacher, damage):
    note = cache / "shard-000000.json"
    note.write_text(damage)
    before = shards(cache)[0].read_bytes()
    cache_teacher_targets(teacher, labelled_images(ITEMS, C), cache, **SETTINGS)
    assert not note.exists() and shards(cache)[0].read_bytes() == before and len(TeacherCache(cache)) == ITEMS


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"temperature": 1.0}, "temperature is 2.0 here and 1.0 there"),
        ({"depth": 5}, "depth is 6"),
        ({"seed": 3}, "seed"),
    ],
)
def test_another_cache_is_not_written_over(cache, teacher, changed, told):
    before = times(cache)
    with pytest.raises(DataError, match=f"holds another cache: .*{told}"):
        cache_teacher_targets(teacher, labelled_images(ITEMS, C), cache, **SETTINGS | changed)
    assert times(cache) == before


def test_another_teacher_or_dataset_is_not_mixed_in(cache, teacher):
    with pytest.raises(DataError, match="teacher is"):
        cache_teacher_targets(vit(C, seed=2), labelled_images(ITEMS, C), cache, **SETTINGS)
    with pytest.raises(DataError, match="dataset is"):
        cache_teacher_targets(teacher, labelled_images(ITEMS, C, seed=1), cache, **SETTINGS)


def test_a_teacher_that_moved_goes_on_by_its_first_name(cache, teacher, tmp_path):
    before = CacheHeader.load(cache)
    shards(cache)[1].unlink()
    teacher.save_pretrained(tmp_path / "moved")
    moved = type(teacher).from_pretrained(tmp_path / "moved")
    cache_teacher_targets(moved, labelled_images(ITEMS, C), cache, **SETTINGS)
    assert len(shards(cache)) == 5 and CacheHeader.load(cache) == before
    other = dataclasses.replace(before, teacher={**before.teacher, "name": "moved"})
    assert before.differences(other) == []


def test_shards_without_a_header_are_left_alone(cache, teacher):
    (cache / HEADER).unlink()
    with pytest.raises(DataError, match=r"holds shard-000000.arrow but no cache.json"):
        cache_teacher_targets(teacher, labelled_images(ITEMS, C), cache, **SETTINGS)
    assert len(shards(cache)) == 5


def test_augmentation_at_random_is_refused(teacher, tmp_path):
    with pytest.raises(DataError, match=r"augments at random.*SeededViews"):
        cache_teacher_targets(teacher, Augmented(), tmp_path, **SETTINGS)


def test_columns_that_the_teacher_does_not_take_do_not_matter(whole, teacher, tmp_path):
    data = [{**item, "path": "x", "number": 3.0} for item in labelled_images(ITEMS, C)]
    cache_teacher_targets(teacher, data, tmp_path, **SETTINGS)
    assert [file.read_bytes() for file in shards(tmp_path)] == [file.read_bytes() for file in shards(whole)]


@pytest.mark.parametrize(
    "build, given, stored",
    [
        (vit, {}, (40, 0)),
        (vit, {"depth": 6}, (6, 34)),
        (vit, {"sample_size": 9}, (32, 9)),
        (vit, {"depth": 41, "sample_size": 9}, (40, 0)),
        (llama, {}, (2, 38)),
        (llama, {"depth": 14}, (14, 18)),
    ],
)
def test_an_item_holds_what_fits_unless_told_otherwise(build, given, stored, tmp_path):
    data = labelled_images(2, C) if build is vit else labelled_tokens(2, C)
    cache = cache_teacher_targets(build(C), data, tmp_path, show_progress=False, **given)
    assert (cache.header.depth, cache.header.sample_size) == stored


@pytest.mark.parametrize(
    "given, message",
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"depth": 0, "sample_size": 0}, "sample_size is 0"),
        ({"depth": -1}, "depth is -1"),
        (
            {"depth": 140, "sample_size": None, "num_classes": 200},
            "depth is 140.*300 bytes per item, or given with sample_size",
        ),
        ({"design": "topk"}, "design is 'topk'"),
        ({"shard_examples": 0}, "shard_examples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments(teacher, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        cache_teacher_targets(teacher, labelled_images(4, C), tmp_path, **SETTINGS | given)


def test_nothing_to_cache(teacher, tmp_path):
    with pytest.raises(DataError, match="dataset is empty"):
        cache_teacher_targets(teacher, [], tmp_path, **SETTINGS)


def test_a_teacher_that_overflows(tmp_path):
    teacher = vit(C)
    with torch.no_grad():
        teacher.classifier.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        cache_teacher_targets(teacher, labelled_images(4, C), tmp_path, **SETTINGS)


class AnyColumn(torch.nn.Module):
    """A teacher of one's own that takes whatever the collator makes."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, **columns):
        return self.teacher(pixel_values=columns["views"] + columns["shift"][:, None, None, None])


def test_a_teacher_of_ones_own_gets_every_column(teacher, tmp_path):
    data = [
        {"views": item["pixel_values"], "shift": torch.tensor(float(number)), "path": "x"}
        for number, item in enumerate(labelled_images(4, C))
    ]
    cache = cache_teacher_targets(AnyColumn(teacher), data, tmp_path, **SETTINGS)
    assert cache.header.inputs == ["shift", "views"] and cache.header.num_classes == C
    batch = default_data_collator(data[2:])
    with torch.no_grad():
        best = AnyColumn(teacher)(**batch).logits.argmax(1)
    assert torch.equal(cache.header.layout.unpack(stored_items(cache.look_up(batch))).ids[:, 0], best)


def test_a_collator_that_drops_examples_is_refused(teacher, tmp_path):
    with pytest.raises(DataError, match="made 2 examples of 3: a cache needs one that keeps every example"):
        cache_teacher_targets(
            teacher,
            labelled_images(4, C),
            tmp_path,
            data_collator=lambda features: default_data_collator(features[:2]),
            **SETTINGS,
        )
