"""Caches on disk: what is written is what is read, and every way of being damaged has an error of its own."""

import hashlib
import json
import os
import pickle
import random
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from huggingface_hub import DatasetCard, RepoUrl
from tiny_models import bert_mlm, labelled_images, labelled_tokens, llama, t5, vit
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_dis import TeacherCache, cache_teacher_targets
from hf_dis.cache import SeededViews
from hf_dis.cache.header import HEADER, CacheHeader
from hf_dis.cache.keys import content_keys
from hf_dis.cache.reader import TARGETS, stored_items
from hf_dis.data import DataError
from hf_dis.teacher.compact import compact_targets

C, ITEMS, SHARD = 40, 23, 5
SETTINGS = {"depth": 6, "sample_size": 8, "shard_examples": SHARD, "batch_size": 3, "show_progress": False}


@pytest.fixture(scope="module")
def teacher():
    return vit(C, seed=1, spread=30)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "cache"
    cache_teacher_targets(teacher, labelled_images(ITEMS, C), path, **SETTINGS)
    return path


@pytest.fixture
def cache(whole, tmp_path):
    """A folder of the test's own."""
    return shutil.copytree(whole, tmp_path / "cache")


def batch(*items):
    data = labelled_images(ITEMS, C)
    return default_data_collator([data[item] for item in items])


def shards(path):
    return sorted(path.glob("*.arrow"))


def times(path):
    return {file.name: file.stat().st_mtime_ns for file in shards(path)}


def test_what_is_read_is_what_the_teacher_said(whole, teacher):
    cache = TeacherCache(whole)
    assert len(cache) == ITEMS and len(shards(whole)) == 5
    found = cache.header.layout.unpack(stored_items(cache.look_up(batch(22, 3, 3, 11))))
    with torch.no_grad():
        logits = teacher(batch(22, 3, 3, 11)["pixel_values"]).logits
    expected = compact_targets(logits, 2.0, 6, 8, torch.Generator())
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=4e-3)
    torch.testing.assert_close(found.log_normaliser, expected.log_normaliser, rtol=0, atol=1e-5)
    assert torch.equal(found.stored_ids[1], found.stored_ids[2])


def test_it_says_what_it_is(whole, teacher):
    header = CacheHeader.load(whole)
    assert (header.num_classes, header.temperature, header.depth, header.sample_size) == (C, 2.0, 6, 8)
    assert header.teacher["name"] == "ViTForImageClassification" and len(header.teacher["weights"]) == 32
    assert header.inputs == ["pixel_values"] and header.dataset["examples"] == ITEMS
    assert header.labels is None and header.views is None
    assert sum(shard.examples for shard in header.shards) == ITEMS


def test_datasets_opens_it(whole, tmp_path):
    loaded = datasets.load_dataset(str(whole), split="train", cache_dir=str(tmp_path))
    assert loaded.column_names == ["key", "targets"] and len(loaded) == ITEMS
    assert loaded[7]["key"] == content_keys(batch(7), ["pixel_values"])[0]
    assert bytes(loaded[7]["targets"]) == TeacherCache(whole).look_up(batch(7)).numpy().tobytes()


def test_the_folder_is_a_data_set_of_the_hub(whole, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repo_id, **settings):
            seen["created"] = repo_id, settings
            return RepoUrl(f"https://huggingface.co/datasets/me/{repo_id}")

        def upload_folder(self, **settings):
            seen["uploaded"] = settings

    monkeypatch.setattr("hf_dis.data.teacher_cache.HfApi", Api)
    url = TeacherCache(whole).push_to_hub("targets", private=True, token="t")
    assert url == "https://huggingface.co/datasets/me/targets" and seen["token"] == "t"
    assert seen["created"] == ("targets", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert seen["uploaded"] == {"repo_id": "me/targets", "folder_path": whole, "repo_type": "dataset"}
    card = DatasetCard.load(whole / "README.md")
    assert "the 6 likeliest of 40 classes" in card.text and card.data.tags == ["hf_dis", "knowledge-distillation"]


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
    with pytest.raises(
        DataError, match=rf"half-written: {len(done)} of 5 shards.*run what wrote it again|Run what wrote"
    ):
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


def test_every_flipped_byte_of_a_shard_is_seen(cache):
    shard = shards(cache)[2]
    content = shard.read_bytes()
    places = [*random.Random(0).sample(range(len(content)), 60), 0, len(content) - 1]
    for place in places:
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(DataError, match=rf"{shard.name} is damaged.*Copy it again"):
            TeacherCache(cache)
    shard.write_bytes(content)
    assert len(TeacherCache(cache)) == ITEMS


def test_a_flipped_byte_of_the_header_is_seen_or_does_not_matter(cache):
    header = cache / HEADER
    content, expected = header.read_bytes(), CacheHeader.load(cache)
    for place in random.Random(0).sample(range(len(content)), 80):
        header.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 7]) + content[place + 1 :])
        try:
            found = CacheHeader.load(cache)
        except DataError as error:
            assert HEADER in str(error) or "format" in str(error)
        else:
            assert found == expected  # white space


def test_a_missing_shard(cache):
    shards(cache)[1].unlink()
    with pytest.raises(DataError, match=r"shard-000001.arrow of the cache .* is missing"):
        TeacherCache(cache)


def test_no_cache(tmp_path):
    with pytest.raises(DataError, match=r"no teacher cache.*cache_teacher_targets"):
        TeacherCache(tmp_path)


def test_a_newer_format(cache):
    header = json.loads((cache / HEADER).read_text())
    (cache / HEADER).write_text(json.dumps({**header, "version": 2, "something": "new"}))
    with pytest.raises(DataError, match="written in format 2, and this version of hf_dis reads up to 1: upgrade"):
        TeacherCache(cache)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"version": "1"}', '{"version": 1, "format": "other"}', "\x00"]
)
def test_another_file_in_the_place_of_the_header(cache, content):
    (cache / HEADER).write_text(content)
    with pytest.raises(DataError, match="is damaged"):
        TeacherCache(cache)


def forge(cache, change=lambda content: None, shard=None):
    """Alters the header, or the first shard, with right checksums: as whoever alters a cache can do."""
    content = json.loads((cache / HEADER).read_text())
    del content["checksum"]
    if shard is not None:
        (cache / content["shards"][0]["file"]).write_bytes(shard)
        content["shards"][0] |= {"num_bytes": len(shard), "xxh3_128": xxhash.xxh3_128(shard).hexdigest()}
    change(content)
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (cache / HEADER).write_text(json.dumps({**content, "checksum": checksum}))


def test_a_header_that_is_only_written_otherwise_is_taken(cache):
    forge(cache)
    assert len(TeacherCache(cache)) == ITEMS


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("num_classes", "40", "num_classes is '40'"),
        ("num_classes", 2**31 + 1, "at most 2,147,483,648"),
        ("num_classes", True, "num_classes is True"),
        ("depth", 41, "at most num_classes, 40"),
        ("sample_size", -1, "0 or more"),
        ("temperature", 0, "above 0"),
        ("temperature", float("nan"), "temperature is nan"),
        ("temperature", 10**400, "finite"),
        ("tail", ["systematic"], "one of systematic"),
        ("seed", 0.5, "seed is 0.5"),
        ("teacher", {"name": "t"}, "a dictionary with name, revision, weights"),
        ("teacher", None, "teacher is None"),
        ("labels", 5, "labels is 5"),
        ("inputs", "pixel_values", "a list of names"),
        ("inputs", [], "a list of names"),
        ("dataset", {"examples": "23", "fingerprint": ""}, "a dictionary with examples"),
        ("views", {"number": 1}, "a dictionary with number, seed"),
        ("shard_examples", 6, "examples of shard-000000.arrow is 5: it has to be 6"),
        ("shards", {}, None),
        ("shards", [{"file": "shard-000000.arrow"}], "missing 4"),
        ("shards", 7, "not iterable"),
        ("other", 1, "unexpected"),
    ],
)
def test_a_forged_header_is_refused(cache, name, value, told):
    forge(cache, lambda content: content.update({name: value}))
    with pytest.raises(DataError, match="half-written" if told is None else f"{HEADER} is damaged.*{told}"):
        TeacherCache(cache)


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "shard-000001.arrow", 3])
def test_no_file_is_read_but_the_shards_of_the_folder(cache, name):
    shutil.copy(shards(cache)[0], cache.parent / "outside.arrow")
    forge(cache, lambda content: content["shards"][0].update(file=name))
    with pytest.raises(DataError, match=r"file is .*shard-000000\.arrow, by its place|a name"):
        TeacherCache(cache)


def test_a_header_nested_without_end_is_refused(cache):
    (cache / HEADER).write_text("[" * 100_000)
    with pytest.raises(DataError, match="is damaged"):
        TeacherCache(cache)


def shard_of(keys, targets, **options):
    sink = pa.BufferOutputStream()
    table = pa.table({"key": keys, "targets": targets})
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_a_shard_of_another_make_is_refused(cache):
    table = pa.ipc.open_stream(shards(cache)[0].read_bytes()).read_all()
    keys, targets = table["key"], table["targets"]
    forge(cache, shard=shard_of(keys, targets, compression="zstd"))
    assert len(TeacherCache(cache)) == ITEMS
    length = len(targets[0].as_py())
    others = {
        "its columns are": (keys.cast(pa.string()), targets),
        "some of its values are missing": (pa.array([None] * SHARD, pa.int64()), targets),
        f"{SHARD} items of {SHARD} examples are not": (keys, pa.array([bytes(length)] * (SHARD - 1) + [b""])),
        f"items of {SHARD} examples are not .*": (
            keys,
            pa.array([bytes(length - 1)] * (SHARD - 1) + [bytes(length + SHARD - 1)]),
        ),
        f"of {SHARD} examples": (keys[1:], targets[1:]),
    }
    for told, (other_keys, other_targets) in others.items():
        forge(cache, shard=shard_of(other_keys, other_targets))
        with pytest.raises(DataError, match=f"is none of a teacher cache.*{told}.*again"):
            TeacherCache(cache)


def test_offsets_beyond_the_end_are_refused(cache):
    """Arrow opens it: only its own validation looks at them."""
    content = shards(cache)[0].read_bytes()
    length = len(pa.ipc.open_stream(content).read_all()["targets"][0].as_py())
    offsets = np.arange(SHARD + 1, dtype=np.int32) * length
    assert content.count(offsets.tobytes()) == 1
    beyond = offsets.copy()
    beyond[2] = 1000 * length
    for wrong in (beyond, offsets + 1000 * length):
        forge(cache, shard=content.replace(offsets.tobytes(), wrong.tobytes()))
        with pytest.raises(DataError, match="is none of a teacher cache"):
            TeacherCache(cache)


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


def test_another_teacher_or_data_set_is_not_mixed_in(cache, teacher):
    with pytest.raises(DataError, match="teacher is"):
        cache_teacher_targets(vit(C, seed=2), labelled_images(ITEMS, C), cache, **SETTINGS)
    with pytest.raises(DataError, match="dataset is"):
        cache_teacher_targets(teacher, labelled_images(ITEMS, C, seed=1), cache, **SETTINGS)


def test_shards_without_a_header_are_left_alone(cache, teacher):
    (cache / HEADER).unlink()
    with pytest.raises(DataError, match=r"holds shard-000000.arrow but no cache.json"):
        cache_teacher_targets(teacher, labelled_images(ITEMS, C), cache, **SETTINGS)
    assert len(shards(cache)) == 5


def test_an_example_that_is_not_there(whole):
    other = default_data_collator(labelled_images(4, C, seed=9))
    with pytest.raises(DataError, match=r"4 of 4 examples are not in the cache.*un-augmented"):
        TeacherCache(whole).look_up(other)


class Augmented(torch.utils.data.Dataset):
    def __init__(self):
        self.items = labelled_images(6, C)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        return {**item, "pixel_values": item["pixel_values"] + 0.1 * torch.randn(3, 8, 8)}


def test_augmentation_at_random_is_refused(teacher, tmp_path):
    with pytest.raises(DataError, match=r"augments at random.*SeededViews"):
        cache_teacher_targets(teacher, Augmented(), tmp_path, **SETTINGS)


def test_seeded_views_are_replayed(teacher, tmp_path):
    cache = cache_teacher_targets(teacher, SeededViews(Augmented(), 3, seed=5), tmp_path, **SETTINGS)
    assert len(cache) == 18 and cache.header.views == {"number": 3, "seed": 5}
    views = DataLoader(
        SeededViews(Augmented(), 3, seed=5),
        batch_size=6,
        shuffle=True,
        num_workers=2,
        collate_fn=cache.collator(default_data_collator),
    )
    for given in views:
        with torch.no_grad():
            best = teacher(given["pixel_values"]).logits.argmax(1)
        assert torch.equal(cache.header.layout.unpack(stored_items(given[TARGETS])).ids[:, 0], best)
    with pytest.raises(DataError, match=r"6 of 6 examples are not in the cache.*SeededViews of seed 5"):
        cache.look_up(default_data_collator([SeededViews(Augmented(), 3, seed=6)[index] for index in range(6)]))


def test_it_travels_to_other_processes(whole):
    cache = pickle.loads(pickle.dumps(TeacherCache(whole)))
    assert torch.equal(cache.look_up(batch(4)), TeacherCache(whole).look_up(batch(4)))


def test_columns_that_the_teacher_does_not_take_do_not_matter(whole, teacher, tmp_path):
    data = [{**item, "path": "x", "number": 3.0} for item in labelled_images(ITEMS, C)]
    cache_teacher_targets(teacher, data, tmp_path, **SETTINGS)
    assert [file.read_bytes() for file in shards(tmp_path)] == [file.read_bytes() for file in shards(whole)]


@pytest.mark.parametrize("build", [llama, bert_mlm, t5])
def test_supervised_tokens_are_rows(build, tmp_path):
    teacher, data = build(50, seed=1, spread=30), labelled_tokens(7, 50)
    for number, item in enumerate(data):
        item["labels"][: number % 4] = -100
    cache = cache_teacher_targets(teacher, data, tmp_path, temperature=1.0, **SETTINGS)
    collated = default_data_collator([data[3], data[0]])
    supervised = collated["labels"][:, 1:] if build is llama else collated["labels"]
    found = cache.header.layout.unpack(stored_items(cache.look_up(collated)))
    with torch.no_grad():
        logits = teacher(**collated).logits[:, :-1] if build is llama else teacher(**collated).logits
    expected = logits[supervised != -100].topk(6).indices
    assert torch.equal(found.ids, expected)
    assert sum(shard.items for shard in cache.header.shards) == sum(
        int((item["labels"][1:] if build is llama else item["labels"]).ne(-100).sum()) for item in data
    )


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
def test_a_row_holds_what_fits_unless_told_otherwise(build, given, stored, tmp_path):
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
            "depth is 140.*300 bytes an item, or given with tail",
        ),
        ({"tail": "topk"}, "tail is 'topk'"),
        ({"shard_examples": 0}, "shard_examples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments(teacher, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        cache_teacher_targets(teacher, labelled_images(4, C), tmp_path, **SETTINGS | given)


def test_nothing_to_cache(teacher, tmp_path):
    with pytest.raises(DataError, match="data set is empty"):
        cache_teacher_targets(teacher, [], tmp_path, **SETTINGS)


def test_a_teacher_that_overflows(tmp_path):
    teacher = vit(C)
    with torch.no_grad():
        teacher.classifier.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        cache_teacher_targets(teacher, labelled_images(4, C), tmp_path, **SETTINGS)
