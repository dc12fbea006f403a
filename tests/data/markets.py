"""Hand-made folders and archives in the format of Market-1501, for tests."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from PIL import Image

from hf_dis.data.market1501 import ARCHIVE, FOLDER


def jpeg(shade: int = 0, size: tuple[int, int] = (8, 16)) -> bytes:
    """A grey image, all of it of the same shade."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def market_files() -> dict[str, bytes]:
    """Paths, below the top folder, and content: three identities to train on, two to test on, junk, a distractor."""
    names = [
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0002_c2s1_000301_01.jpg",
        "bounding_box_train/0007_c6s4_001877_01.jpg",
        "bounding_box_train/1488_c1s6_023021_00.jpg.jpg",  # as it is in the official archive
        "query/0001_c1s1_001051_00.jpg",
        "query/0003_c3s3_000001_00.jpg",
        "bounding_box_test/-1_c1s1_000401_03.jpg",
        "bounding_box_test/0000_c1s1_000151_01.jpg",
        "bounding_box_test/0001_c2s1_001052_00.jpg",
        "bounding_box_test/0003_c3s3_000002_00.jpg",
    ]
    return {name: jpeg(20 * index) for index, name in enumerate(names)}


def write_market_folder(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """Writes the extracted folder into ``folder`` and returns its path."""
    for name, content in (market_files() if files is None else files).items():
        file = folder / FOLDER / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder / FOLDER


def write_market_archive(folder: Path, files: dict[str, bytes] | None = None, others: dict | None = None) -> Path:
    """Writes the archive into ``folder`` and returns its path. ``others``: content by ZipInfo or by whole name."""
    path = folder / ARCHIVE
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (market_files() if files is None else files).items():
            archive.writestr(f"{FOLDER}/{name}", content)
        for name, content in (others or {}).items():
            archive.writestr(name, content)
    return path
