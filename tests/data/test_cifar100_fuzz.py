"""The reader of CIFAR-100 under damaged and forged archives and folders: the documented error or sound images, and
nothing else."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from archives import cifar100_files, member
from fuzzing import NAMES, damaged, examples, nothing_run_or_written_but_in, pickles, put, write_archive
from hypothesis import given
from hypothesis import strategies as st

from hf_dis.data import DataError, load_cifar100
from hf_dis.data import cifar100 as module
from hf_dis.data.cifar100 import ARCHIVE, FOLDER, REMEDY

WHOLE = cifar100_files(train=4, test=3)
KEYS = ["data", "fine_labels", "coarse_labels", "fine_label_names", "coarse_label_names"]
LIMIT = 1 << 20  # stands for the 512 MiB that an archive may unpack to


@st.composite
def contents(draw) -> dict[str, bytes]:
    """Files of the dataset, one of them damaged or forged."""
    name = draw(st.sampled_from(list(WHOLE)))
    return {**WHOLE, name: draw(damaged(WHOLE[name]) | damaged(WHOLE[name][-200:]) | pickles(KEYS))}


@st.composite
def archives(draw) -> bytes:
    """An archive with damage to its files, its list of members, its headers or its compressed stream."""
    where = draw(st.sampled_from(["content", "members", "tar", "gzip", "bomb"]))
    files = draw(contents()) if where == "content" else WHOLE
    members = [member(f"{FOLDER}/{name}", content) for name, content in files.items()]
    if where == "members":
        for _ in range(draw(st.integers(1, 3))):
            info, content = draw(st.sampled_from(members))
            name = draw(st.sampled_from([*NAMES, f"{FOLDER}/train", f"{FOLDER}//train", f"./{FOLDER}/test"]))
            kind = draw(
                st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, b"S", b"x"])
            )
            link = draw(st.sampled_from(["/etc/passwd", f"{FOLDER}/meta", info.name, *NAMES]))
            members.insert(draw(st.integers(0, 3)), member(name, content, type=kind, linkname=link))
            if draw(st.booleans()):
                members.remove((info, content))
    if where == "bomb":
        members.insert(draw(st.integers(0, 3)), member("zeros", bytes(draw(st.sampled_from([LIMIT, 4 * LIMIT])))))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    stream = buffer.getvalue()
    packed = gzip.compress(draw(damaged(stream)) if where == "tar" else stream, draw(st.sampled_from([0, 1])))
    return draw(damaged(packed)) if where == "gzip" else packed


def check(write) -> bool:
    """Returns True if a folder that ``write`` fills loads; checks that it is otherwise refused as documented."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = write(folder)
        with nothing_run_or_written_but_in(folder / "cache"), mock.patch.object(module, "MAX_BYTES", LIMIT):
            try:
                loaded = load_cifar100(data_dir, verify_checksum=False, cache_dir=folder / "cache")
            except DataError as error:
                assert str(folder) in str(error) and REMEDY in str(error)
                return False
            for example in (example for split in loaded.values() for example in split):
                assert example["img"].size == (32, 32) and example["img"].mode == "RGB"
                assert 0 <= example["fine_label"] < 100 and 0 <= example["coarse_label"] < 20
        assert {path.name for path in folder.iterdir()} <= {ARCHIVE, FOLDER, "cache"}
        return True


@st.composite
def folders(draw) -> dict[str, bytes | str]:
    """Files of the extracted folder, by name; where one is a text, what else is in its place."""
    files = draw(contents())
    name = draw(st.sampled_from(list(files)))
    other = draw(st.sampled_from(["nothing", "a folder", "a pipe", "a loop", "a link", "a device", "a huge file"]))
    return {**files, name: other} if draw(st.booleans()) else files


def write_folder(files: dict[str, bytes | str]):
    def write(folder: Path) -> Path:
        (folder / FOLDER).mkdir()
        for name, content in files.items():
            put(folder / FOLDER / name, content, 64 * LIMIT)
        return folder

    return write


def test_whole_archives_load():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in WHOLE.items():
            info, content = member(f"{FOLDER}/{name}", content)
            archive.addfile(info, io.BytesIO(content))
    assert check(write_archive(ARCHIVE, buffer.getvalue()))


@examples(100)
@given(archives())
def test_damaged_and_forged_archives(archive):
    check(write_archive(ARCHIVE, archive))


@pytest.mark.slow
@examples(400)
@given(archives())
def test_many_damaged_and_forged_archives(archive):
    check(write_archive(ARCHIVE, archive))


@examples(60)
@given(folders())
def test_damaged_and_forged_folders(files):
    check(write_folder(files))


@pytest.mark.slow
@examples(200)
@given(folders())
def test_many_damaged_and_forged_folders(files):
    check(write_folder(files))
