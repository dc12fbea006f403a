import shutil
import struct
import sys
from functools import partial

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, features

from hf_dis.data import DataError, Glyphs, glyphs, load_glyphs


def square(width):
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (width, 700), (width, 0)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


def write_font(path, characters, *, blank=(), width=500):
    """A font with a box for every character."""
    names = {ord(character): f"glyph{ord(character)}" for character in characters}
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    empty = {names[ord(character)] for character in blank}
    shapes = {name: TTGlyphPen(None).glyph() if name in empty else square(width) for name in names.values()}
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), **shapes})
    builder.setupHorizontalMetrics({name: (600, 0) for name in [".notdef", *names.values()]})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture
def fonts(tmp_path):
    """Three small fonts: A and B in all, C in two, D in one; B is blank in the third."""
    return [
        write_font(tmp_path / "One.ttf", "ABCD"),
        write_font(tmp_path / "Two.ttf", "ABC", width=400),
        write_font(tmp_path / "Three.ttf", "AB", blank="B"),
    ]


@pytest.fixture
def load(tmp_path):
    return partial(load_glyphs, cache_dir=tmp_path / "cache")


def content(split):
    characters, faces = split.features["label"], split.features["face"]
    return [
        (faces.int2str(example["face"]), chr(int(characters.int2str(example["label"])[2:], 16))) for example in split
    ]


def test_characters_that_enough_faces_draw(fonts, load):
    loaded = load(fonts, min_faces=2, test_faces=["Two"])
    assert content(loaded["train"]) == [("One", "A"), ("One", "B"), ("One", "C"), ("Three", "A")]
    assert content(loaded["test"]) == [("Two", "A"), ("Two", "B"), ("Two", "C")]
    for split in loaded.values():
        assert list(split.features) == ["image", "label", "face"]
        assert split.features["label"].names == ["U+0041", "U+0042", "U+0043"]
        assert split.features["face"].names == ["One", "Two", "Three"]
    assert load(fonts, min_faces=1, test_faces=["Two"])["train"].features["label"].names[-1] == "U+0044"
    assert load(fonts, min_faces=3, test_faces=["Two"])["train"].features["label"].num_classes == 2


@pytest.mark.parametrize("size", [8, 32, 45])
def test_images_are_centred_characters(size, fonts, load):
    image = load(fonts, size=size, min_faces=2, test_faces=["Two"])["test"][0]["image"]
    expected = Image.new("L", (size, size))
    font = ImageFont.truetype(str(fonts[1]), int(size * 0.72), layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(expected).text((size // 2, size // 2), "A", fill=255, font=font, anchor="mm")
    assert image.mode == "L" and image.size == (size, size)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_controls_spaces_and_separators_are_left_out(tmp_path, load):
    files = [write_font(tmp_path / f"{name}.ttf", "\t \x85\u2029A") for name in ("One", "Two")]
    assert load(files, min_faces=1, test_faces=["One"])["train"].features["label"].names == ["U+0041"]


def test_the_classes_of_the_default_set(tmp_path):
    builder = Glyphs(cache_dir=tmp_path)
    train, test = builder._split_generators(None)
    faces = {split.name: [face.name for face in split.gen_kwargs["faces"]] for split in (train, test)}
    assert builder.info.features["label"].num_classes == 3375
    assert set(faces["test"]) == {"DejaVuSerif-Bold", "DejaVuSansMono-Oblique"}
    assert sorted(faces["train"] + faces["test"]) == sorted(glyphs.MATPLOTLIB_FACES)
    characters = set().union(*(glyphs._code_points(face.file) for face in train.gen_kwargs["faces"]))
    classes = {int(name[2:], 16) for name in builder.info.features["label"].names}
    assert classes <= characters, "every class is in the training faces"


@pytest.mark.slow
@pytest.mark.skipif(not features.check("raqm"), reason="another text layout leaves more invisible characters blank")
def test_the_images_of_the_default_set(load):
    """The numbers that the documentation and the demonstration rely on."""
    loaded = load(num_proc=2)
    seen = set(loaded["train"]["label"]) | set(loaded["test"]["label"])
    assert (len(loaded["train"]), len(loaded["test"]), len(seen)) == (32920, 5683, 3318)
    assert set(loaded["test"]["label"]) <= set(loaded["train"]["label"])


# The cache


def test_changed_fonts_and_settings_do_not_meet_a_stale_cache(fonts, load):
    options = {"min_faces": 2, "test_faces": ["Two"]}
    before = load(fonts, **options)["train"][0]["image"]
    write_font(fonts[0], "ABCD", width=200)
    after = load(fonts, **options)["train"][0]["image"]
    assert np.asarray(before).sum() > np.asarray(after).sum()
    assert load(fonts, **options, size=16)["train"][0]["image"].size == (16, 16)
    assert set(content(load(fonts, **{**options, "test_faces": ["One"]})["test"])) == {("One", c) for c in "ABC"}
    renamed = shutil.copy(fonts[0], fonts[0].with_name("Other.ttf"))
    assert content(load([renamed, *fonts[1:]], **options)["train"])[0] == ("Other", "A")


def test_a_second_load_renders_nothing(fonts, load, monkeypatch):
    first = load(fonts, min_faces=2, test_faces=["Two"])
    monkeypatch.setattr(Glyphs, "_split_generators", None)
    second = load([str(path) for path in fonts], min_faces=2, test_faces=["Two"])
    assert second["train"].features == first["train"].features
    assert content(second["train"]) == content(first["train"])


# Refusals


def test_a_missing_font_file(fonts, load):
    with pytest.raises(DataError, match=r"no font file .*Nowhere\.ttf"):
        load([*fonts, fonts[0].with_name("Nowhere.ttf")], test_faces=["One"])


@pytest.mark.parametrize("whole", [b"not a font", b""])
def test_a_file_that_is_no_font(whole, fonts, load, tmp_path):
    fake = tmp_path / "Fake.ttf"
    fake.write_bytes(whole)
    with pytest.raises(DataError, match=r"Fake\.ttf is not a usable TrueType or OpenType font"):
        load([*fonts, fake], min_faces=1, test_faces=["One"])


def test_a_truncated_font(fonts, load, tmp_path):
    fake = tmp_path / "Fake.ttf"
    for share in (0.1, 0.5, 0.9):
        fake.write_bytes(fonts[0].read_bytes()[: int(share * fonts[0].stat().st_size)])
        with pytest.raises(DataError, match=r"Fake\.ttf"):
            load([*fonts, fake], min_faces=1, test_faces=["One"])


def test_a_font_that_cannot_be_rendered(fonts, load):
    fonts[2].write_bytes(fonts[2].read_bytes().replace(b"head", b"none"))
    with pytest.raises(DataError, match=r"Three\.ttf is not a usable TrueType or OpenType font"):
        load(fonts, min_faces=1, test_faces=["One"])


def test_a_font_with_an_outline_that_cannot_be_rendered(fonts, load):
    """The font opens and names its characters; a box with more contours than points fails in rendering."""
    with TTFont(fonts[2]) as font:
        start = font.reader.tables["glyf"].offset
    content = bytearray(fonts[2].read_bytes())
    content[start : start + 2] = b"\x7f\xff"
    fonts[2].write_bytes(content)
    for num_proc in (None, 2):
        with pytest.raises(DataError, match=r"Three\.ttf is not a usable TrueType or OpenType font"):
            load(fonts, min_faces=1, test_faces=["One"], num_proc=num_proc)


def test_fonts_without_a_visible_glyph(fonts, load, tmp_path):
    blank = write_font(tmp_path / "Blank.ttf", "AB", blank="AB")
    with pytest.raises(
        DataError, match=r"fonts of test have no visible glyph, so drop them from font_files: .*Blank\.ttf"
    ):
        load([*fonts, blank], min_faces=1, test_faces=["Blank"])


def test_a_font_that_claims_billions_of_characters(fonts, load, tmp_path):
    """Each group of a character map names its first and last."""
    font = write_font(tmp_path / "Many.ttf", "A😀")
    group = struct.pack(">LL", 0x1F600, 0x1F600)
    assert font.read_bytes().count(group) >= 1
    font.write_bytes(font.read_bytes().replace(group, struct.pack(">LL", 0x1F600, 0xFFFFFFFF)))
    with pytest.raises(DataError, match=r"Many\.ttf .*it claims 4,294,838,785 characters"):
        load([*fonts, font], min_faces=1, test_faces=["One"])


def test_a_font_without_unicode_characters(fonts, load):
    path = write_font(fonts[0].with_name("Symbols.ttf"), "A")
    font = TTFont(path)
    font["cmap"].tables = [table for table in font["cmap"].tables if not table.isUnicode()]
    font.save(path)
    with pytest.raises(DataError, match=r"Symbols\.ttf has no map of its Unicode characters"):
        load([*fonts, path], min_faces=1, test_faces=["One"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 7}, "size=7 pixels is too small .* 8 or more"),
        ({"min_faces": 0}, "min_faces=0: it has to be 1 or more"),
        ({"min_faces": 4}, "No character is in min_faces=4 of the 3 font files"),
        ({"test_faces": ["One", "Four"]}, "'Four', which font_files lacks. The faces given are One, Two, Three"),
        ({"test_faces": None}, "'DejaVuSerif-Bold', which font_files lacks. The faces given are One, Two, Three"),
        ({"test_faces": []}, "test_faces is empty: .* The faces given are One, Two, Three"),
        ({"test_faces": ["Three", "One", "Two"]}, "holds out every face"),
        ({"test_faces": "One"}, "test_faces should be a list, got the string 'One'"),
        ({"font_files": "One.ttf"}, r"font_files should be a list, got the string 'One\.ttf'"),
        ({"font_files": []}, "The faces given are none"),
    ],
)
def test_unusable_settings(options, message, fonts, load):
    with pytest.raises(DataError, match=message):
        load(**{"font_files": fonts, "min_faces": 1, "test_faces": ["One"], **options})


def test_a_face_given_twice(fonts, load, tmp_path):
    (tmp_path / "copy").mkdir()
    copy = shutil.copy(fonts[0], tmp_path / "copy")
    with pytest.raises(DataError, match="One is in font_files more than once"):
        load([*fonts, copy], test_faces=["Two"])


@pytest.mark.parametrize("package, fonts_given", [("matplotlib", False), ("fontTools.ttLib", True)])
def test_missing_packages_are_named(package, fonts_given, fonts, load, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install hf_dis\[examples\]"):
        load(fonts if fonts_given else None, test_faces=["One"] if fonts_given else None)
