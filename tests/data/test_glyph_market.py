"""The content of the generated folder in the format of Market-1501."""

from collections import Counter

import pytest

from hf_dis.data import DataError, load_market1501, write_glyph_market
from hf_dis.data import glyph_market as module
from hf_dis.data.market1501 import KINDS


@pytest.fixture(scope="module", autouse=True)
def characters():
    """The images of the characters, rendered once for all tests here."""
    rendered = module._characters(32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_characters", lambda size: list(rendered))
        yield rendered


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.jpg")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, characters):
    return write_glyph_market(tmp_path_factory.mktemp("glyphs") / "market", train_identities=7, test_identities=4)


@pytest.fixture(scope="module")
def loaded(folder, tmp_path_factory):
    return load_market1501(folder, cache_dir=tmp_path_factory.mktemp("cache"))


def test_every_identity_is_seen_by_every_camera(loaded):
    assert Counter(zip(loaded["train"]["pid"], loaded["train"]["camid"], strict=True)) == {
        (pid, camera): 1 for pid in range(1, 8) for camera in range(1, 7)
    }
    assert loaded["train"]["label"][:] == [pid - 1 for pid in loaded["train"]["pid"]]


def test_test_identities_are_others_and_each_query_has_its_matches(loaded):
    seen = {(pid, camera) for pid in range(8, 12) for camera in range(1, 7)}
    assert Counter(zip(loaded["query"]["pid"], loaded["query"]["camid"], strict=True)) == dict.fromkeys(seen, 1)
    persons = loaded["gallery"].filter(lambda kind: KINDS[kind] == "person", input_columns="kind")
    assert Counter(zip(persons["pid"], persons["camid"], strict=True)) == dict.fromkeys(seen, 1)


def test_the_gallery_has_distractors_and_junk(loaded):
    assert Counter(KINDS[kind] for kind in loaded["gallery"]["kind"]) == {"person": 24, "distractor": 12, "junk": 12}


def test_an_image_is_a_character_on_black_and_no_two_are_the_same(loaded, folder):
    for image in loaded["train"]["image"]:
        assert image.size == (32, 32) and image.mode == "RGB"
        assert image.getpixel((0, 0)) < (40, 40, 40) and image.convert("L").getextrema()[1] > 60
    assert len(set(files(folder).values())) == len(files(folder)) == 42 + 48 + 24


def test_all_characters_are_in_all_typefaces(characters):
    assert {len(faces) for faces in characters} == {6} and len(characters) > 2000


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    numbers = {"train_identities": 7, "test_identities": 4}
    assert files(write_glyph_market(tmp_path / "again", **numbers)) == files(folder)
    assert files(write_glyph_market(tmp_path / "other", seed=1, **numbers)) != files(folder)


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} exists"):
        write_glyph_market(tmp_path)
    with pytest.raises(DataError, match="test_identities=0: give 1 or more"):
        write_glyph_market(tmp_path / "new", test_identities=0)
    with pytest.raises(DataError, match=r"take 9301 characters, 100 of them distractors.* share \d+: ask for fewer"):
        write_glyph_market(tmp_path / "new", train_identities=9001)
    assert list(tmp_path.iterdir()) == []
