"""CIFAR-100 as folders of images, ``train/<class>/*.png`` and ``test/<class>/*.png``, the form of public copies."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from hf_dis.errors import DataError

IMAGES_PER_CLASS = {"train": 500, "test": 100}
SIDE = 32
# Larger than any PNG of 32x32 RGB pixels, and small enough to read.
MAX_IMAGE_BYTES = 1 << 16
REMEDY = "Copy the folders again, or give the official archive as data_dir= (--data_dir)."


def is_class_folders(folder: Path) -> bool:
    """Checks if a folder has ``train`` and ``test`` as folders."""
    return all((folder / split).is_dir() for split in IMAGES_PER_CLASS)


def list_images(folder: Path, names: list[str], check_counts: bool) -> dict[str, list[tuple[Path, int]]]:
    """Lists the images of both splits with the numbers of their classes, by class and file name.

    Args:
        folder: with ``train`` and ``test``. Hidden files are left out.
        names: the classes, each the name of a folder.
        check_counts: refuse classes with a different number of images than the official one, 500 and 100.

    Raises:
        DataError: if folders or files are missing or have other names; it lists up to five of them.
    """
    return {
        split: _of_split(folder / split, names, IMAGES_PER_CLASS[split], check_counts) for split in IMAGES_PER_CLASS
    }


def _of_split(folder: Path, names: list[str], official: int, check_counts: bool) -> list[tuple[Path, int]]:
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    if missing := [name for name in names if name not in present]:
        raise DataError(f"{folder} has no folder of {_some(missing)}: CIFAR-100 has one for each class. {REMEDY}")
    if unknown := sorted(present - set(names)):
        raise DataError(f"{folder} has {_some(unknown)}, which is not a class of CIFAR-100. {REMEDY}")
    images, counts = [], {}
    for number, name in enumerate(names):
        files = sorted(entry for entry in (folder / name).iterdir() if not entry.name.startswith("."))
        if others := [str(file) for file in files if file.suffix.lower() != ".png" or not file.is_file()]:
            raise DataError(f"{_some(others)} is not a PNG file: a copy of CIFAR-100 has PNG files alone. {REMEDY}")
        images += [(file, number) for file in files]
        counts[name] = len(files)
    other = [f"{name} ({count:,})" for name, count in counts.items() if count != official]
    if check_counts and other:
        raise DataError(
            f"{folder} should have {official} images of each class, and has a different number of {_some(other)}. "
            f"{REMEDY} To use the images as they are, pass verify_checksum=False (--no_verify_checksum)."
        )
    if not images:
        raise DataError(f"{folder} has no images. {REMEDY}")
    return images


def _some(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def content_digest(folder: Path) -> str:
    """Computes a digest of the names and contents of all images, for the name of the built dataset.

    Raises:
        DataError: if a file is too large for such an image, or cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*/*")):
        if not path.name.startswith(".") and path.is_file():
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(_content(path)).digest())
    return digest.hexdigest()[:16]


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            raise DataError(f"{path} has {size:,} bytes, more than an image of {SIDE}x{SIDE} pixels. {REMEDY}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. {REMEDY}") from error


def read_image(path: Path) -> np.ndarray:
    """Reads the pixels of an image, uint8 ``[32, 32, 3]``.

    Raises:
        DataError: if the file is not a PNG of 32x32 RGB pixels.
    """
    content = io.BytesIO(_content(path))
    try:
        with Image.open(content, formats=["PNG"]) as image:
            found = f"{image.width}x{image.height} {image.mode}"
            if found != f"{SIDE}x{SIDE} RGB":
                raise DataError(f"{path} is an image of {found}: CIFAR-100 has {SIDE}x{SIDE} RGB. {REMEDY}")
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise DataError(f"{path} cannot be read as a PNG image: {error}. {REMEDY}") from error
