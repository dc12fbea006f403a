"""Images of characters in several typefaces: thousands of classes from fonts that are already installed."""

from __future__ import annotations

import hashlib
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_dis.data.content import ContentConfig
from hf_dis.errors import DataError

MATPLOTLIB_FACES = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
]
TEST_FACES = ("DejaVuSerif-Bold", "DejaVuSansMono-Oblique")
MAX_CHARACTERS = 0x110000
MIN_SIZE = 8
MIN_INK = 10  # of 255: a glyph whose brightest pixel is darker counts as blank


def load_glyphs(
    font_files: Sequence[str | Path] | None = None,
    *,
    size: int = 32,
    min_faces: int = 8,
    test_faces: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> datasets.DatasetDict:
    """Renders the characters of font files: splits ``train`` and ``test`` share classes but no typeface.

    The columns are ``image`` (``size`` x ``size``, grey), ``label`` (the character, named like ``U+0041``)
    and ``face`` (the typeface, named like its file). By default there are 3,375 classes and 38,603 images,
    5,683 of the images in ``test``. Blank images are left out, so 57 of the classes (kinds of space and other
    invisible characters) have a label but no image.

    Args:
        font_files: .ttf or .otf files; None: fourteen that matplotlib installs.
        size: height and width of the images in pixels, at least 8.
        min_faces: a character that fewer typefaces contain is left out.
        test_faces: the typefaces held out for ``test``; None: DejaVuSerif-Bold and DejaVuSansMono-Oblique.
        cache_dir: folder of the built dataset; None: the cache of Hugging Face Datasets.
        num_proc: processes that build the dataset; None: this process alone.

    Raises:
        DataError: if a file is missing or no font, or the settings leave no classes, training or test images.
        ImportError: if matplotlib or fonttools is not installed.
    """
    builder = Glyphs(
        cache_dir=None if cache_dir is None else str(cache_dir),
        font_files=font_files,
        size=size,
        min_faces=min_faces,
        test_faces=test_faces,
    )
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


@dataclass
class GlyphsConfig(ContentConfig):
    """The arguments of :func:`load_glyphs`; ``digest`` is that of these arguments and the fonts' content."""

    font_files: Sequence[str | Path] | None = None
    size: int = 32
    min_faces: int = 8
    test_faces: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < MIN_SIZE:
            raise DataError(f"size={self.size} pixels is too small to recognise characters: use {MIN_SIZE} or more.")
        if self.min_faces < 1:
            raise DataError(f"min_faces={self.min_faces}: it has to be 1 or more.")
        for name in ("font_files", "test_faces"):
            if isinstance(getattr(self, name), str):
                raise DataError(f"{name} should be a list, got the string {getattr(self, name)!r}: put it in a list.")
        self.font_files = matplotlib_fonts() if self.font_files is None else [Path(path) for path in self.font_files]
        self.test_faces = list(TEST_FACES if self.test_faces is None else self.test_faces)
        self._check_faces()
        self.digest = self._content_digest()

    @property
    def faces(self) -> list[str]:
        """The names of the typefaces: their files' names without the ending."""
        return [path.stem for path in self.font_files]

    def _check_faces(self) -> None:
        if missing := [path for path in self.font_files if not path.is_file()]:
            raise DataError(f"There is no font file {missing[0]}: check font_files.")
        if repeated := [face for face, count in Counter(self.faces).items() if count > 1]:
            raise DataError(
                f"{repeated[0]} is in font_files more than once: file names identify faces, so give each file once."
            )
        known = f"The faces given are {', '.join(self.faces) or 'none'}"
        if unknown := [face for face in self.test_faces if face not in self.faces]:
            raise DataError(f"test_faces names {unknown[0]!r}, which font_files lacks. {known}.")
        if not self.test_faces:
            raise DataError(f"test_faces is empty: hold out at least one face for the test split. {known}.")
        if set(self.test_faces) == set(self.faces):
            raise DataError(f"test_faces holds out every face and leaves none to train on. {known}.")

    def _content_digest(self) -> str:
        settings = (self.faces, self.size, self.min_faces, sorted(self.test_faces))
        digest = hashlib.sha256(repr(settings).encode())
        for path in self.font_files:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


class _Face(NamedTuple):
    """The glyphs of one typeface: labels of the classes, and as many images ``[characters, size, size]``."""

    file: Path
    labels: list[int]
    images: np.ndarray

    @property
    def name(self) -> str:
        return self.file.stem


class Glyphs(datasets.GeneratorBasedBuilder):
    """Builds the glyph images; :func:`load_glyphs` is the short way to the dataset."""

    VERSION = datasets.Version("1.0.1")
    BUILDER_CONFIG_CLASS = GlyphsConfig

    def _info(self) -> datasets.DatasetInfo:
        # The classes are known once the fonts have been read: _split_generators adds the features.
        return datasets.DatasetInfo(description="Characters in several typefaces, one class per character.")

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        config = self.config
        contents = [_code_points(path) for path in config.font_files]
        counts = Counter(code_point for content in contents for code_point in content)
        classes = sorted(code_point for code_point, count in counts.items() if count >= config.min_faces)
        if not classes:
            raise DataError(
                f"No character is in min_faces={config.min_faces} of the {len(contents)} font files: lower "
                "min_faces or give more fonts that share a script."
            )
        self.info.features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=[f"U+{code_point:04X}" for code_point in classes]),
                "face": datasets.ClassLabel(names=config.faces),
            }
        )
        # Rendered here, where errors reach the caller as they are; workers are sent the images, and encode them.
        faces = [
            _rendered(path, config.size, [pair for pair in enumerate(classes) if pair[1] in content])
            for path, content in zip(config.font_files, contents, strict=True)
        ]
        held_out = set(config.test_faces)
        splits = {
            "train": [face for face in faces if face.name not in held_out],
            "test": [face for face in faces if face.name in held_out],
        }
        for split, used in splits.items():
            if not any(face.labels for face in used):
                told = ", ".join(str(face.file) for face in used)
                raise DataError(f"The fonts of {split} have no visible glyph, so drop them from font_files: {told}")
        return [datasets.SplitGenerator(split, {"faces": used}) for split, used in splits.items()]

    def _generate_examples(self, faces: list[_Face]) -> Iterator[tuple[str, dict[str, Any]]]:
        for face in faces:
            for label, image in zip(face.labels, face.images, strict=True):
                yield f"{face.name} {label}", {"image": image, "label": label, "face": face.name}


def _rendered(path: Path, size: int, characters: list[tuple[int, int]]) -> _Face:
    """Renders characters, pairs of label and code point; those without ink are left out."""
    try:
        # The other layout engine needs a system library, and renders some invisible characters.
        font = ImageFont.truetype(str(path), int(size * 0.72), layout_engine=ImageFont.Layout.BASIC)
        labels, images = [], []
        for label, code_point in characters:
            image = Image.new("L", (size, size))
            ImageDraw.Draw(image).text((size // 2, size // 2), chr(code_point), 255, font, anchor="mm")
            if image.getextrema()[1] >= MIN_INK:
                labels.append(label)
                images.append(np.asarray(image))
    except Exception as error:  # Pillow raises any kind of error of its library
        raise _unusable(path, error) from error
    return _Face(path, labels, np.stack(images) if images else np.empty((0, size, size), np.uint8))


def matplotlib_fonts() -> list[Path]:
    """The files of fourteen typefaces that matplotlib installs.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "The default fonts come with matplotlib: pip install hf_dis[examples], or pass font_files."
        ) from error
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return [folder / f"{face}.ttf" for face in MATPLOTLIB_FACES]


def _code_points(path: Path) -> set[int]:
    """The characters of a font, without controls, the space, and characters that a line of text cannot hold."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise ImportError("Reading fonts needs fonttools: pip install hf_dis[examples].") from error
    try:
        ImageFont.truetype(str(path), MIN_SIZE)
        with TTFont(path, lazy=True) as font:
            _check_ranges(font.getTableData("cmap"))
            characters = font.getBestCmap()
    except Exception as error:  # the parsers of fontTools raise any kind of error
        raise _unusable(path, error) from error
    if characters is None:
        raise DataError(f"{path} has no map of its Unicode characters: drop it from font_files.")
    # Paragraph separators (bidirectional class B) have no glyph, and text layout refuses them.
    return {code for code in characters if code > 32 and unicodedata.bidirectional(chr(code)) != "B"}


def _check_ranges(cmap: bytes) -> None:
    """Raises ValueError if a character map unfolds to more characters than Unicode has: a group may name billions."""
    (num_tables,) = struct.unpack_from(">H", cmap, 2)
    for record in range(num_tables):
        (offset,) = struct.unpack_from(">L", cmap, 8 + 8 * record)
        (kind,) = struct.unpack_from(">H", cmap, offset)
        if kind not in (12, 13):
            continue  # other kinds name each character, or those of the basic plane
        (num_groups,) = struct.unpack_from(">L", cmap, offset + 12)
        groups = struct.iter_unpack(">LLL", cmap[offset + 16 : offset + 16 + 12 * num_groups])
        count = sum(last - first + 1 for first, last, _ in groups)
        if count > MAX_CHARACTERS:
            raise ValueError(f"it claims {count:,} characters, and Unicode has room for {MAX_CHARACTERS:,}")


def _unusable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a usable TrueType or OpenType font ({error}): drop it from font_files.")
