"""Damaged and forged caches: every way of being damaged has an error of its own."""

import hashlib
import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from small_cache import ITEMS, SETTINGS, SHARD, C, shards, times
from tiny_models import labelled_images

from hf_dis import TeacherCache, cache_teacher_targets
from hf_dis.cache.header import HEADER, CacheHeader
from hf_dis.errors import DataError


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
    (cache / HEADER).write_text(json.dumps({**header, "version": 3, "something": "new"}))
    with pytest.raises(DataError, match="written in format 3, and this version of hf_dis reads up to 2: upgrade"):
        TeacherCache(cache)


def test_an_older_format(cache, teacher):
    """Written by the first version, whose keys left out the place of the supervised tokens."""
    content = json.loads((cache / HEADER).read_text())
    names = {"sample_size": "tail_draws", "design": "tail"}
    older = {names.get(name, name): value for name, value in content.items()} | {"version": 1}
    older["shards"] = [
        {"rows" if name == "items" else name: shard[name] for name in shard} for shard in older["shards"]
    ]
    (cache / HEADER).write_text(json.dumps(older))
    told = r"written in format 1, and this version of hf_dis reads format 2: write the cache again.*another folder"
    with pytest.raises(DataError, match=told):
        TeacherCache(cache)
    before = times(cache)
    with pytest.raises(DataError, match=told):
        cache_teacher_targets(teacher, labelled_images(ITEMS, C), cache, **SETTINGS)
    assert times(cache) == before


@pytest.mark.parametrize("version", [0, -1, True, 2.0, "2", None])
def test_a_version_that_was_never_written_is_damage(cache, version):
    forge(cache, lambda content: content.update(version=version))
    with pytest.raises(DataError, match=f"{HEADER} is damaged.*version is {version!r}"):
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
        ("design", ["systematic"], "one of systematic, independent"),
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
        with pytest.raises(DataError, match=f"is not a shard of a teacher cache.*{told}.*again"):
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
        with pytest.raises(DataError, match="is not a shard of a teacher cache"):
            TeacherCache(cache)
