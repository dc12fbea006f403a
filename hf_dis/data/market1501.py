"""Market-1501 as a Hugging Face dataset, from the official archive or its extracted folder."""

from __future__ import annotations

import hashlib
import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
from PIL import Image
from transformers.utils import logging

from hf_dis.data.content import ContentConfig
from hf_dis.errors import DataError

logger = logging.get_logger(__name__)

HOMEPAGE = "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html"
FOLDER = "Market-1501-v15.09.15"
ARCHIVE = f"{FOLDER}.zip"
SPLITS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
COUNTS = {"train": 12_936, "query": 3_368, "gallery": 19_732}
TRAIN_IDENTITIES = 751
JUNK, DISTRACTOR = -1, 0
KINDS = ["person", "distractor", "junk"]
# Identity, camera, sequence, frame, box. The official 1488_c1s6_023021_00.jpg.jpg has its ending twice.
NAME = re.compile(r"(-1|\d{4})_c(\d)s\d_\d+_\d+(?:\.jpg){1,2}", re.ASCII)
FORMAT = "should be named like 0002_c1s1_000451_03.jpg: identity, camera, sequence, frame, box"
NO_IMAGES = {"Thumbs.db", ".DS_Store"}  # left behind by file browsers, in the official archive too
REMEDY = f"Download {ARCHIVE}, which {HOMEPAGE} links to, again and pass its path as data_dir= (--data_dir)."
# The official archive holds 150 MB, and its largest image is far smaller than these.
MAX_BYTES, MAX_IMAGE_BYTES, MAX_PIXELS = 1 << 30, 4 << 20, 1 << 24
# What zipfile and the file system raise where an archive is damaged, in its list of members too.
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, UnicodeDecodeError, struct.error)
LISTED = 10  # names in a message, at most


def load_market1501(data_dir: str | Path, *, cache_dir: str | Path | None = None) -> datasets.DatasetDict:
    """Loads Market-1501 (Zheng et al., ICCV 2015), splits ``train``, ``query`` and ``gallery``.

    The columns are ``image``, ``pid``, ``camid``, ``label`` and ``kind``. ``pid`` is the identity and ``camid`` the
    camera, from 1 on, both as in the file's name. ``label`` is the class of the identity among the sorted ones of
    ``train``. Identities that ``train`` lacks have the label -1, the mark of Datasets for a missing label. These are
    all identities of the official ``query`` and ``gallery``. The gallery keeps its distractors (false detections: pid
    0, kind ``distractor``) and its junk (boxes that count neither as right nor as wrong: pid -1, kind ``junk``).

    A warning gives the differences where the numbers of images and training identities are not the official ones.

    Args:
        data_dir: the official ``Market-1501-v15.09.15.zip``, a folder that holds it, a folder that holds the extracted
            ``Market-1501-v15.09.15/``, or that extracted folder itself (the archive is preferred where there are
            both). Nothing is extracted to disk.
        cache_dir: folder of the built dataset; None: the cache of Hugging Face Datasets.

    Raises:
        DataError: if a split's folder is missing or empty, files are not named in the official format or are not
            images, or the archive is damaged or hostile; names the files.
    """
    builder = Market1501(cache_dir=None if cache_dir is None else str(cache_dir), data_dir=str(data_dir))
    builder.download_and_prepare()
    loaded = builder.as_dataset()
    _warn_of_differences(loaded, data_dir)
    return loaded


def _warn_of_differences(loaded: datasets.DatasetDict, data_dir: str | Path) -> None:
    found = {name: len(split) for name, split in loaded.items()}
    found["training identities"] = len(loaded["train"].features["label"].names)
    expected = {**COUNTS, "training identities": TRAIN_IDENTITIES}
    if found != expected:
        told = ", ".join(f"{name} {count:,} ({count - expected[name]:+,})" for name, count in found.items())
        logger.warning(f"{data_dir} is not the whole of Market-1501. It has, against the official counts: {told}")
    tested = {pid for split in ("query", "gallery") for pid in loaded[split]["pid"]}
    if both := sorted(tested & set(loaded["train"]["pid"])):
        logger.warning(
            f"{data_dir}: {len(both)} identities of query or gallery are in {SPLITS['train']} too, which the protocol "
            f"of Market-1501 rules out: {_listed(both)}"
        )


@dataclass
class Market1501Config(ContentConfig):
    """The files to build from: ``data_dir`` as in :func:`load_market1501`.

    ``digest`` is that of the files' names and content.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_dir is None:
            raise DataError(
                f"data_dir is None: Market1501 needs data_dir=, the path of {ARCHIVE}, which {HOMEPAGE} links to."
            )
        self.digest = _content_digest(_locate(self.data_dir))


class Market1501(datasets.GeneratorBasedBuilder):
    """Builds Market-1501 from local files; :func:`load_market1501` is the short way to the dataset."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = Market1501Config

    def _info(self) -> datasets.DatasetInfo:
        # The classes are known once the names have been read: _split_generators adds the features.
        return datasets.DatasetInfo(
            description="Persons seen by six cameras, for re-identification.", homepage=HOMEPAGE
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        # Everything is checked here, where errors reach the caller as they are, and all of them at once.
        path = _locate(self.config.data_dir)
        with _opened(path) as source:
            entries = {split: _parsed(source, folder) for split, folder in SPLITS.items()}
            _check_images(source, [entry for split in entries.values() for entry in split])
        identities = sorted({entry.pid for entry in entries["train"]})
        self.info.features = datasets.Features(
            {
                "image": datasets.Image(),
                "pid": datasets.Value("int32"),
                "camid": datasets.Value("int32"),
                "label": datasets.ClassLabel(names=[f"{pid:04d}" for pid in identities]),
                "kind": datasets.ClassLabel(names=KINDS),
            }
        )
        labels = {pid: label for label, pid in enumerate(identities)}
        return [
            datasets.SplitGenerator(split, {"path": path, "entries": tuple(entries[split]), "labels": labels})
            for split in SPLITS
        ]

    def _generate_examples(
        self, path: Path, entries: tuple[_Entry, ...], labels: dict[int, int]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        with _opened(path) as source:
            for entry in entries:
                image = {"bytes": source.read(entry), "path": entry.name}
                kind = {JUNK: "junk", DISTRACTOR: "distractor"}.get(entry.pid, "person")
                label = labels.get(entry.pid, -1)
                example = {"image": image, "pid": entry.pid, "camid": entry.camid, "label": label, "kind": kind}
                yield f"{entry.folder}/{entry.name}", example


class _Entry(NamedTuple):
    """An image: the folder of the split, the name of the file, and identity and camera from this name."""

    folder: str
    name: str
    pid: int
    camid: int

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"


class _Archive:
    """The official archive, read in memory: nothing is written, whatever the names of the members."""

    def __init__(self, path: Path) -> None:
        self.path, self.archive = path, zipfile.ZipFile(path)
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in self.archive.infolist():
            _check_member(path, member)
            if member.filename in self.members:
                raise DataError(f"{path}: {member.filename} is in it twice. {REMEDY}")
            self.members[member.filename] = member
        if sum(member.file_size for member in self.members.values()) > MAX_BYTES:
            raise DataError(f"{path} unpacks to more than {MAX_BYTES >> 20} MiB: it is not {ARCHIVE}. {REMEDY}")

    def names(self, folder: str) -> list[str] | None:
        """The names of the files in the folder of a split; None if there is no such folder."""
        prefix = f"{FOLDER}/{folder}/"
        inside = [name.removeprefix(prefix) for name in self.members if name.startswith(prefix)]
        return [name for name in inside if name] if inside else None

    def read(self, entry: _Entry) -> bytes:
        # zipfile reads no more than the size in the directory, and compares a checksum.
        return self.archive.read(self.members[f"{FOLDER}/{entry}"])

    def close(self) -> None:
        self.archive.close()


class _Folder:
    """The extracted folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self, folder: str) -> list[str] | None:
        """The names of the files in the folder of a split; None if there is no such folder."""
        split = self.path / folder
        return [item.name for item in split.iterdir()] if split.is_dir() else None

    def read(self, entry: _Entry) -> bytes:
        file = self.path / entry.folder / entry.name
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{file} is not a regular file: copy the image itself there.")
        if status.st_size > MAX_IMAGE_BYTES:
            raise DataError(f"{file} is larger than {MAX_IMAGE_BYTES >> 20} MiB: copy the image itself there.")
        return file.read_bytes()

    def close(self) -> None:
        """Nothing is kept open."""


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    name = member.orig_filename  # zipfile cuts its own copy of the name at a zero byte
    if PurePosixPath(name).is_absolute() or ".." in name.split("/") or re.search(r"[\\:\0]", name):
        raise DataError(f"{path}: the member {name!r} would be unpacked elsewhere: it is not {ARCHIVE}. {REMEDY}")
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{path}: {name} is a link or device, no regular file. {REMEDY}")
    if member.flag_bits & 1:
        raise DataError(f"{path}: {name} is encrypted. {REMEDY}")
    if name.endswith(".jpg") and member.file_size > MAX_IMAGE_BYTES:
        raise DataError(
            f"{path}: {name} unpacks to more than {MAX_IMAGE_BYTES >> 20} MiB: it is not an image. {REMEDY}"
        )


@contextmanager
def _opened(path: Path) -> Iterator[_Archive | _Folder]:
    source = None
    try:
        source = _Folder(path) if path.is_dir() else _Archive(path)
        yield source
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}. {REMEDY}") from error
    finally:
        if source is not None:
            source.close()


def _locate(data_dir: str | Path) -> Path:
    """Finds the archive or the extracted folder in ``data_dir``."""
    given = Path(data_dir).expanduser()
    if given.is_file():
        return given
    if (given / ARCHIVE).is_file():
        return given / ARCHIVE
    for folder in (given / FOLDER, given):
        if any((folder / split).is_dir() for split in SPLITS.values()):
            return folder
    state = "holds neither" if given.is_dir() else "does not exist, so is neither"
    raise DataError(f"data_dir {given} {state} {ARCHIVE} nor the extracted {FOLDER}/ folder. {REMEDY}")


def _content_digest(path: Path) -> str:
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted(file for split in SPLITS.values() for file in (path / split).glob("*") if file.is_file())
    for file in files:
        if path.is_dir():
            digest.update(f"{file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _parsed(source: _Archive | _Folder, folder: str) -> list[_Entry]:
    """The images of a split, sorted by name, with identity and camera from the name."""
    names = source.names(folder)
    if names is None:
        raise DataError(f"{source.path} has no folder {folder}/: it is not the whole of {FOLDER}. {REMEDY}")
    names = sorted(set(names) - NO_IMAGES)
    if not names:
        raise DataError(f"{source.path}: the folder {folder}/ holds no images. {REMEDY}")
    matches = {name: NAME.fullmatch(name) for name in names}
    if wrong := [name for name, match in matches.items() if match is None]:
        raise DataError(f"{source.path}: files in {folder}/ {FORMAT}. {len(wrong)} are not: {_listed(wrong)}")
    entries = [_Entry(folder, name, int(match[1]), int(match[2])) for name, match in matches.items()]
    if folder != SPLITS["gallery"] and (wrong := [entry.name for entry in entries if entry.pid <= 0]):
        raise DataError(
            f"{source.path}: junk (-1) and distractors (0000) belong into {SPLITS['gallery']}/ and have no place in "
            f"{folder}/, which holds {len(wrong)}: {_listed(wrong)}"
        )
    return entries


def _check_images(source: _Archive | _Folder, entries: list[_Entry]) -> None:
    broken = []
    for entry in entries:
        try:
            with Image.open(io.BytesIO(source.read(entry)), formats=["JPEG"]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"it claims {image.width} x {image.height} pixels")
                image.load()
        except DataError:
            raise
        except Exception as error:  # zipfile and Pillow raise any kind of error
            broken.append(f"{entry} ({type(error).__name__}: {str(error)[:80]})")
    if broken:
        raise DataError(f"{source.path}: {len(broken)} images cannot be read: {_listed(broken)}. {REMEDY}")


def _listed(names: list[Any]) -> str:
    told = ", ".join(str(name) for name in names[:LISTED])
    return told if len(names) <= LISTED else f"{told}, and {len(names) - LISTED} more"
