"""Caches on disk: the targets that are read are those that the teacher gave, of its examples only."""

import pickle

import datasets
import pytest
import torch
from huggingface_hub import DatasetCard, RepoUrl
from small_cache import ITEMS, SETTINGS, Augmented, C, batch, shards
from tiny_models import bert_mlm, labelled_images, labelled_tokens, llama, t5
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_dis import TeacherCache, cache_teacher_targets
from hf_dis.cache import SeededViews
from hf_dis.cache.header import CacheHeader
from hf_dis.cache.keys import content_keys
from hf_dis.errors import DataError
from hf_dis.items import stored_items
from hf_dis.teacher.cached import TARGETS
from hf_dis.teacher.compact import compact_targets


def test_the_targets_are_those_of_the_teacher(whole, teacher):
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


def test_a_single_example(whole):
    """An item takes 31 bytes, no multiple of a number's."""
    cache = TeacherCache(whole)
    assert cache.header.layout.item_bytes == 31
    alone, both = (cache.header.layout.unpack(stored_items(cache.look_up(batch(*given)))) for given in ([7], [7, 8]))
    assert all(torch.equal(one[0], first[0]) for one, first in zip(alone, both, strict=True))


def test_the_header_describes_the_cache(whole, teacher):
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


def test_the_folder_is_a_dataset_of_the_hub(whole, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repo_id, **settings):
            seen["created"] = repo_id, settings
            return RepoUrl(f"https://huggingface.co/datasets/me/{repo_id}")

        def upload_folder(self, **settings):
            seen["uploaded"] = settings

    monkeypatch.setattr("hf_dis.cache.reader.HfApi", Api)
    url = TeacherCache(whole).push_to_hub("targets", private=True, token="t")
    assert url == "https://huggingface.co/datasets/me/targets" and seen["token"] == "t"
    assert seen["created"] == ("targets", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert seen["uploaded"] == {"repo_id": "me/targets", "folder_path": whole, "repo_type": "dataset"}
    card = DatasetCard.load(whole / "README.md")
    assert "the 6 likeliest of 40 classes" in card.text and card.data.tags == ["hf_dis", "knowledge-distillation"]


def test_an_example_that_is_not_there(whole):
    other = default_data_collator(labelled_images(4, C, seed=9))
    with pytest.raises(DataError, match=r"4 of 4 examples are not in the cache.*un-augmented"):
        TeacherCache(whole).look_up(other)


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


@pytest.mark.parametrize("build", [llama, bert_mlm, t5])
def test_supervised_tokens_are_items(build, tmp_path):
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
