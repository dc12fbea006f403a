"""The reader of Market-1501 under damaged and forged archives and folders: the documented error or images that can
be decoded, and nothing else."""

from __future__ import annotations

import io
import stat
import tempfile
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import pytest
from fuzzing import NAMES, damaged, examples, nothing_run_or_written_but_in, put, write_archive
from hypothesis import given
from hypothesis import strategies as st
from markets import market_files
from PIL import Image

from hf_dis.data import DataError, load_market1501
from hf_dis.data import market1501 as module
from hf_dis.data.market1501 import ARCHIVE, FOLDER

LIMIT = 1 << 20  # stands for the 1 GiB that an archive may unpack to


def jpeg_with_metadata() -> bytes:
    """A JPEG that says it is turned, and has a comment and a thumbnail's worth of other metadata."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text" * 20
    buffer = io.BytesIO()
    Image.new("RGB", (8, 16), "red").save(buffer, "JPEG", exif=exif, comment=b"comment", progressive=True)
    return buffer.getvalue()


WHOLE = {**market_files(), "query/0003_c3s3_000001_00.jpg": jpeg_with_metadata()}
REMEDIES = ["Download", "should be named like", "belong into", "copy the image itself there"]


@st.composite
def files(draw) -> dict[str, bytes]:
    """The files of the dataset, some damaged, renamed or missing."""
    found = dict(WHOLE)
    for name in draw(st.lists(st.sampled_from([*WHOLE, "query/0003_c3s3_000001_00.jpg"]), min_size=1, max_size=3)):
        if name in found:
            content = found.pop(name)
            kind = draw(st.sampled_from(["damage", "rename", "drop", "bomb"]))
            if kind == "damage":
                found[name] = draw(damaged(content))
            elif kind == "rename":
                folder, number = name.split("/")[0], draw(st.integers(0, 9999))
                found[f"{folder}/{draw(st.sampled_from(['0000', '-1', f'{number:04}', '²³¹¹']))}_c1s1_1_1.jpg"] = (
                    content
                )
            elif kind == "bomb":
                found[name] = bytes(draw(st.sampled_from([LIMIT, 2 * LIMIT])))
    return found


@st.composite
def archives(draw) -> bytes:
    """An archive with damage to its files, its list of members, or its bytes."""
    where = draw(st.sampled_from(["files", "members", "bytes"]))
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # two members of a name
        for name, content in (draw(files()) if where == "files" else WHOLE).items():
            archive.writestr(f"{FOLDER}/{name}", content, draw(st.sampled_from([0, zipfile.ZIP_DEFLATED])))
        for _ in range(draw(st.integers(1, 3)) if where == "members" else 0):
            name = draw(st.sampled_from([*NAMES[:9], *WHOLE, "query", "query/", "query/a/b.jpg"]))
            info = zipfile.ZipInfo(draw(st.sampled_from([name, f"{FOLDER}/{name}"])))
            kind = draw(st.sampled_from([0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK]))
            info.external_attr = kind << 16 | draw(st.integers(0, 0xFFFF))
            archive.writestr(info, draw(st.sampled_from([b"", b"/etc/passwd", *WHOLE.values()])))
    return draw(damaged(buffer.getvalue())) if where == "bytes" else buffer.getvalue()


def check(write) -> bool:
    """Returns True if a folder that ``write`` fills loads; checks that it is otherwise refused as documented."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = write(folder)
        with nothing_run_or_written_but_in(folder / "cache"), mock.patch.object(module, "MAX_BYTES", LIMIT):
            try:
                loaded = load_market1501(data_dir, cache_dir=folder / "cache")
            except DataError as error:
                assert str(folder) in str(error) and any(remedy in str(error) for remedy in REMEDIES)
                return False
            for example in (example for split in loaded.values() for example in split):
                assert example["image"].width * example["image"].height <= module.MAX_PIXELS
                assert example["pid"] >= -1 and example["label"] >= -1 and example["kind"] in range(3)
        assert {path.name for path in folder.iterdir()} <= {ARCHIVE, FOLDER, "cache"}
        return True


@st.composite
def folders(draw) -> dict[str, bytes | str]:
    """Files of the extracted folder, by name; where one is a text, what else is in its place."""
    found = draw(files())
    name = draw(st.sampled_from([*found, "query/Thumbs.db", "query/notes.txt", "bounding_box_test"]))
    other = draw(st.sampled_from(["a folder", "a pipe", "a loop", "a link", "a device", "a huge file"]))
    return {**found, name: other}


def write_folder(found: dict[str, bytes | str]):
    def write(folder: Path) -> Path:
        for name, content in found.items():
            file = folder / FOLDER / name
            file.parent.mkdir(parents=True, exist_ok=True)
            put(file, content, 64 * LIMIT)
        return folder

    return write


def test_whole_archives_and_folders_load():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in WHOLE.items():
            archive.writestr(f"{FOLDER}/{name}", content)
    assert check(write_archive(ARCHIVE, buffer.getvalue())) and check(write_folder(WHOLE))


@examples(100)
@given(archives())
def test_damaged_and_forged_archives(archive):
    check(write_archive(ARCHIVE, archive))


@examples(60)
@given(folders())
def test_damaged_and_forged_folders(found):
    check(write_folder(found))


@pytest.mark.slow
@examples(400)
@given(archives())
def test_many_damaged_and_forged_archives(archive):
    check(write_archive(ARCHIVE, archive))


@pytest.mark.slow
@examples(200)
@given(folders())
def test_many_damaged_and_forged_folders(found):
    check(write_folder(found))
