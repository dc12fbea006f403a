"""The card of a cache: what the Hub and huggingface_hub read of it."""

import dataclasses

import pytest
from huggingface_hub import DatasetCard, metadata_load
from small_cache import C
from tiny_models import labelled_images, vit

from hf_dis import cache_teacher_targets
from hf_dis.cache.card import cache_card


@pytest.fixture
def cache(tmp_path):
    teacher = vit(C, seed=1, spread=30)
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n")
    teacher = type(teacher).from_pretrained(tmp_path / "teacher")
    return cache_teacher_targets(teacher, labelled_images(8, C), tmp_path / "cache", show_progress=False)


def test_licence_and_teacher_of_a_folder(cache):
    data = metadata_load(cache.path / "README.md")
    assert data["license"] == "mit" and data["tags"] == ["hf_dis", "knowledge-distillation"]
    assert data["size_categories"] == ["n<1K"] and data["annotations_creators"] == ["machine-generated"]
    assert data["configs"] == [{"config_name": "default", "data_files": "*.arrow"}]
    text = DatasetCard.load(cache.path / "README.md").text
    assert "Targets of teacher (a local directory) for 8 examples" in text and "revision is unknown" in text
    assert "The licence above is the teacher's." in text


def test_a_teacher_of_the_hub(cache):
    teacher = {**cache.header.teacher, "name": "an-org/teacher", "revision": "0123abcd"}
    card = DatasetCard(cache_card(dataclasses.replace(cache.header, teacher=teacher), {}))
    assert card.data.tags[-1] == "teacher:an-org/teacher" and "license" not in card.data.to_dict()
    assert "[an-org/teacher](https://huggingface.co/an-org/teacher)" in card.text and "0123abcd" in card.text
    assert "licence is unknown" in card.text


@pytest.mark.parametrize(
    ("examples", "expected"),
    [(1, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**12, "1B<n<10B")],
)
def test_sizes(cache, examples, expected):
    header = dataclasses.replace(cache.header, shards=[], dataset={**cache.header.dataset, "examples": examples})
    assert DatasetCard(cache_card(header, {})).data.size_categories == [expected]
