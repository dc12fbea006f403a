"""The reader of teacher caches under damaged and forged ones: the documented error or a teacher's targets, and nothing
else. Forged ones have right checksums: whoever alters a cache can write these too."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import xxhash
from fuzzing import NAMES, damaged, examples, nothing_run_or_written_but_in
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import labelled_images, vit
from transformers import default_data_collator

from hf_dis import TeacherCache, cache_teacher_targets
from hf_dis.cache.attach import cached_teacher
from hf_dis.cache.header import HEADER
from hf_dis.errors import DataError
from hf_dis.items import Items, stored_items

C, ITEMS = 40, 6  # 40 is not a power of two: an id may be out of range
NUMBERS = st.sampled_from([0, 1, -1, 2, 5, 2**31, 2**63, 10**400, 0.0, -1.0, 1e-320, 1e308, math.inf, math.nan, True])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "cache"
    settings = {"depth": 4, "sample_size": 3, "shard_examples": 4, "batch_size": 3, "show_progress": False}
    cache_teacher_targets(vit(C, seed=1, spread=30), labelled_images(ITEMS, C), path, **settings)
    return path


def sealed(content: dict) -> str:
    """A header with a right checksum."""
    content = {name: value for name, value in content.items() if name != "checksum"}
    return json.dumps(
        {**content, "checksum": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
    )


@st.composite
def headers(draw, content: dict) -> str:
    """A header with changed or missing values, or with changed bytes."""
    if not draw(st.integers(0, 3)):
        return draw(damaged(json.dumps(content).encode())).decode(errors="replace")
    changed = json.loads(json.dumps(content))
    place = draw(st.sampled_from([changed, changed["dataset"], changed["teacher"], *changed["shards"]]))
    for name in draw(st.lists(st.sampled_from([*place, "other"]), min_size=1, max_size=2)):
        if draw(st.booleans()):
            place[name] = draw(NUMBERS | ANYTHING)
        else:
            place.pop(name, None)
    return sealed(changed)


@st.composite
def shards(draw, content: bytes) -> bytes:
    """A shard with damage, or another table in its place."""
    kind = draw(st.sampled_from(["anywhere", "targets", "table"]))
    if kind != "table":
        start = 0 if kind == "anywhere" else len(content) - 128
        return content[:start] + draw(damaged(content[start:]))
    table = pa.ipc.open_stream(content).read_all()
    key, targets = table.columns
    keys = [key, key.cast(pa.int32(), safe=False), key.cast(pa.string()), pa.nulls(len(key), pa.int64())]
    items = [targets, targets.cast(pa.large_binary()), pa.nulls(len(key), pa.binary()), targets.dictionary_encode()]
    items += [pa.array([b""] * len(key)), pa.array([draw(st.binary(max_size=40))] * len(key))]
    items += [pa.array([bytes([draw(st.integers(0, 255))]) * len(targets[0].as_py())] * len(key))]
    columns = {
        "key": draw(st.sampled_from(keys)),
        draw(st.sampled_from(["targets", "key2"])): draw(st.sampled_from(items)),
    }
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=draw(st.sampled_from([None, "zstd", "lz4"])))
    with pa.ipc.new_stream(sink, pa.table(columns).schema, options=options) as writer:
        writer.write_table(pa.table(columns), max_chunksize=draw(st.integers(1, 4)))
    return sink.getvalue().to_pybytes()


@st.composite
def caches(draw, whole: Path) -> dict[str, bytes | None]:
    """Files that are to be other ones; None where there is to be none."""
    content = json.loads((whole / HEADER).read_text())
    if draw(st.booleans()):
        return {HEADER: draw(headers(content)).encode(errors="replace")}
    shard = draw(st.sampled_from(content["shards"]))
    other = draw(shards((whole / shard["file"]).read_bytes()) | st.none())
    if other is not None and draw(st.integers(0, 9)):
        shard |= {"num_bytes": len(other), "xxh3_128": xxhash.xxh3_128(other).hexdigest()}
    return {shard["file"]: other, HEADER: sealed(content).encode()}


def check(whole: Path, files: dict[str, bytes | None]) -> bool:
    """Returns True if a cache with these files opens and answers; otherwise checks the documented refusal."""
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(whole, Path(name) / "cache")
        for file, content in files.items():
            (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        with nothing_run_or_written_but_in(Path(name) / "nowhere"):
            try:
                cache = TeacherCache(folder)
            except DataError as error:
                remedies = ["again", "upgrade hf_dis"]
                assert str(folder) in str(error) and any(remedy in str(error) for remedy in remedies)
                return False
            batch = default_data_collator(labelled_images(ITEMS, C))
            try:
                found = cache.look_up(batch)
                assert found.shape[0] == ITEMS and found.shape[2] == cache.header.layout.item_bytes
                (targets,) = cached_teacher(cache)(batch, Items(ITEMS, targets=found[:, 0]))
            except DataError as error:
                assert any(told in str(error) for told in ("not in the cache", "write it again", "collate the same"))
                return False
        assert stored_items(found).shape[1] == cache.header.layout.item_bytes
        assert ((targets.ids >= 0) & (targets.ids < cache.header.num_classes)).all()
        assert targets.target.isfinite().all() and targets.log_probs.isfinite().all()
        torch.testing.assert_close(targets.target.sum(1), torch.ones(ITEMS))
        return True


def test_a_whole_cache_opens_and_answers(whole):
    assert check(whole, {}) and check(whole, {HEADER: sealed(json.loads((whole / HEADER).read_text())).encode()})


@examples(250)
@given(st.data())
def test_damaged_and_forged_caches(whole, data):
    check(whole, data.draw(caches(whole)))


@pytest.mark.slow
@examples(600)
@given(st.data())
def test_many_damaged_and_forged_caches(whole, data):
    check(whole, data.draw(caches(whole)))
