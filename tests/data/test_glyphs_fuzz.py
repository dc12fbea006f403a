"""The reader of fonts under damaged ones: the documented error or images, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import pytest
from fontTools.ttLib import TTFont
from fuzzing import damaged, examples, nothing_run_or_written_but_in
from hypothesis import given
from hypothesis import strategies as st
from test_glyphs import write_font

from hf_dis.data import DataError, glyphs, load_glyphs

TABLES = ["cmap", "glyf", "loca", "head", "hhea", "hmtx", "maxp", "post", "name", "OS/2"]


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fonts")
    return [write_font(folder / f"{name}.ttf", "ABCDE😀") for name in ("One", "Two")]


def table(font: Path, tag: str) -> tuple[int, int]:
    """Where in a font's file a table starts and ends."""
    with TTFont(font) as opened:
        entry = opened.reader.tables[tag]
        return entry.offset, entry.offset + entry.length


@st.composite
def damage(draw, font: Path) -> bytes:
    """The font with damage anywhere, or in one of its tables."""
    content = font.read_bytes()
    start, end = draw(st.sampled_from([(0, len(content)), *(table(font, tag) for tag in TABLES)]))
    return content[:start] + draw(damaged(content[start:end])) + content[end:]


def check(fonts: list[Path], content: bytes) -> bool:
    """Returns True if a font of this content loads beside a whole one; otherwise checks the documented refusal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "Damaged.ttf").write_bytes(content)
        with nothing_run_or_written_but_in(folder / "cache"), mock.patch.object(glyphs, "MAX_CHARACTERS", 500):
            try:
                files = [fonts[0], folder / "Damaged.ttf"]
                loaded = load_glyphs(files, min_faces=1, test_faces=["Damaged"], cache_dir=folder / "cache")
            except DataError as error:
                assert "Damaged.ttf" in str(error) and "from font_files" in str(error)
                return False
            for example in (example for split in loaded.values() for example in split):
                assert example["image"].size == (32, 32) and example["image"].mode == "L"
        return True


def test_a_whole_font_loads(fonts):
    assert check(fonts, fonts[1].read_bytes())


@examples(100)
@given(st.data())
def test_damaged_fonts(fonts, data):
    check(fonts, data.draw(damage(fonts[1])))


@pytest.mark.slow
@examples(400)
@given(st.data())
def test_many_damaged_fonts(fonts, data):
    check(fonts, data.draw(damage(fonts[1])))
