"""A replacement for Market-1501 without a download: the same folders and names, with characters as identities."""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from pathlib import Path

from PIL import Image

from hf_dis.data.glyphs import load_glyphs, matplotlib_fonts
from hf_dis.data.market1501 import DISTRACTOR, JUNK, SPLITS
from hf_dis.errors import DataError

CAMERAS = [
    "DejaVuSans",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-BoldItalic",
]


def write_glyph_market(
    folder: str | Path, *, train_identities: int = 1000, test_identities: int = 200, size: int = 32, seed: int = 0
) -> Path:
    """Writes a folder in the format of Market-1501 in which a character is an identity and a typeface a camera.

    Six cameras see every identity, each image moved, turned and scaled a little. No character is in both training and
    test. A test identity has two images under each camera, a query and one in the gallery. The gallery also has
    distractors, which are other characters, and junk, which shows a part of a character. Identities and distractors
    are chosen at random from the characters that all six typefaces have.

    Args:
        folder: is made; has to be new.
        train_identities: number of characters to train on, 1 or more.
        test_identities: number of characters to retrieve, 1 or more.
        size: height and width of the images in pixels, at least 8.
        seed: the same seed and numbers give the same images.

    Returns:
        the folder, for :func:`hf_dis.data.load_market1501`.

    Raises:
        DataError: if the folder exists, or the typefaces share too few characters.
        ImportError: if matplotlib or fonttools is not installed.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists: name a new folder, or remove this one.")
    if min(train_identities, test_identities) < 1:
        raise DataError(f"train_identities={train_identities}, test_identities={test_identities}: give 1 or more.")
    characters = _characters(size)
    distractors = max(1, test_identities // 2)
    wanted = train_identities + test_identities + distractors
    if wanted > len(characters):
        raise DataError(
            f"{train_identities} training and {test_identities} test identities take {wanted} characters, "
            f"{distractors} of them distractors, and the typefaces share {len(characters)}: ask for fewer."
        )
    rng = random.Random(seed)
    rng.shuffle(characters)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        writer = _Writer(Path(scratch) / folder.name, rng)
        for pid, faces in enumerate(characters[:wanted], start=1):
            if pid <= train_identities:
                folders = [SPLITS["train"]]
            elif pid <= train_identities + test_identities:
                folders = [SPLITS["query"], SPLITS["gallery"]]
            else:
                folders, pid = [SPLITS["gallery"]], DISTRACTOR
            for camera, image in enumerate(faces, start=1):
                for split in folders:
                    writer.write(split, pid, camera, image)
                if pid == DISTRACTOR:
                    writer.write(SPLITS["gallery"], JUNK, camera, image, shift=0.5)
        writer.folder.rename(folder)
    return folder


class _Writer:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.written = folder, rng, 0
        for split in SPLITS.values():
            (folder / split).mkdir(parents=True)

    def write(self, split: str, pid: int, camera: int, image: Image.Image, shift: float = 0.0) -> None:
        """Writes one box, moved by about ``shift`` of its width."""
        self.written += 1
        name = f"{pid if pid == JUNK else format(pid, '04d')}_c{camera}s1_{self.written:06d}_01.jpg"
        _distorted(image, self.rng, shift).convert("RGB").save(self.folder / split / name, quality=95)


def _distorted(image: Image.Image, rng: random.Random, shift: float) -> Image.Image:
    size = image.width
    scale, jitter = rng.uniform(0.85, 1.1), 0.08 * size
    across, down = rng.uniform(-jitter, jitter) + shift * size, rng.uniform(-jitter, jitter)
    turned = image.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR, translate=(across, down))
    edge = size * (1 - 1 / scale) / 2
    return turned.transform(
        (size, size), Image.Transform.EXTENT, (edge, edge, size - edge, size - edge), Image.Resampling.BILINEAR
    )


def _characters(size: int) -> list[list[Image.Image]]:
    """The images of every character that all cameras have, in the order of the cameras."""
    fonts = {font.stem: font for font in matplotlib_fonts()}
    files = [fonts[camera] for camera in CAMERAS]
    glyphs = load_glyphs(files, size=size, min_faces=len(files), test_faces=CAMERAS[-1:])
    faces = defaultdict(list)
    for split in ("train", "test"):
        for example in glyphs[split]:
            faces[example["label"]].append(example["image"])
    return [images for _, images in sorted(faces.items()) if len(images) == len(CAMERAS)]
