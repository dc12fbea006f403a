"""A cache that is damaged, or that does not fit the training, is refused with the value and the remedy."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from tiny_models import labelled_images, vit
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, default_data_collator

from hf_dis import cache_teacher_targets
from hf_dis.cache.header import FORMAT_VERSION, HEADER, CacheHeader
from hf_dis.data import DataError


def words(*tokens):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=tokens[0])))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A cache in four shards: a teacher's targets for 32 images of 40 named classes."""
    folder = tmp_path_factory.mktemp("caches") / "cache"
    teacher = vit(40, seed=1, spread=30, id2label={number: f"class {number}" for number in range(40)})
    settings = {"depth": 6, "sample_size": 8, "shard_examples": 8, "show_progress": False}
    cache_teacher_targets(teacher, labelled_images(32, 40), folder, processing_class=words("a", "b"), **settings)
    return folder


def edited(name, edit):
    """Changes the content of a file of the cache."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def of_format(version):
    """Gives the header the number of a different format."""
    here, there = (f'"version": {number}'.encode() for number in (FORMAT_VERSION, version))
    return edited(HEADER, lambda content: content.replace(here, there))


def removed(name):
    return lambda folder: (folder / name).unlink()


def unfinished(folder):
    """Leaves the folder as it is while its last shard is being written."""
    (folder / "shard-000003.arrow").unlink()
    header = dataclasses.replace(CacheHeader.load(folder), shards=[])
    (folder / HEADER).write_text(header.to_json())


OTHER_LABELS = {"id2label": {number: f"other {number}" for number in range(40)}}
FLIPPED = edited("shard-000001.arrow", lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
AS_IT_IS = edited(HEADER, lambda content: content)

# A change of the folder, what else the trainer is given, error, value, remedy.
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
    "another dataset": (
        AS_IT_IS,
        {"train_dataset": labelled_images(32, 40, seed=3)},
        DataError,
        "16 of 16 examples are not in the cache",
        "Train on the same dataset",
    ),
    "another depth": (AS_IT_IS, {"rank_depth": 5}, ValueError, "rank_depth is 5", "None or 6"),
    "a proposal without its sums": (
        AS_IT_IS,
        {"proposal": "topk"},
        ValueError,
        "proposal is 'topk'",
        "'dis', 'teacher' or",
    ),
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
        of_format(FORMAT_VERSION + 1),
        {},
        DataError,
        f"in format {FORMAT_VERSION + 1}",
        "upgrade hf_dis",
    ),
    "an older format": (of_format(1), {}, DataError, "in format 1", "write the cache again"),
    "half-written": (unfinished, {}, DataError, "3 of 4 shards are there", "Run cache_teacher_targets again"),
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
