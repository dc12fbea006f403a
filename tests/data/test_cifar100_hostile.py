"""Damaged and hostile archives: load_cifar100 refuses them with a DataError and does nothing they ask for."""

import gzip
import io
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
from archives import changed_split, cifar100_files, member, pack, python2_pickle, write_archive

from hf_dis.data import Cifar100, DataError
from hf_dis.data import cifar100 as module
from hf_dis.data.cifar100 import ARCHIVE, FOLDER, HOMEPAGE


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": None}, f"no {FOLDER}/train"),
        ({"test": None}, f"no {FOLDER}/test"),
        ({"meta": None}, f"no {FOLDER}/meta"),
        ({"train": changed_split(data=np.zeros((4, 3072), "f4"))}, r"uint8 \[images, 3072\], found float32"),
        ({"train": changed_split(data=np.zeros((4, 3071), "u1"))}, r"found uint8 \[4, 3071\]"),
        ({"test": changed_split(data=np.zeros(3072, "u1"))}, r"data in test .* found uint8 \[3072\]"),
        ({"train": changed_split(data=[0] * 3072)}, "found list"),
        (
            {"train": changed_split(data=np.zeros((5, 3072), "u1"))},
            r"fine_labels in train should be 5 .* \[4\]",
        ),
        ({"train": changed_split(fine_labels=[0, 1, 2, 100])}, "below 100, found 0 to 100"),
        ({"train": changed_split(fine_labels=[0, 1, 2, -1])}, "below 100, found -1 to 2"),
        ({"train": changed_split(coarse_labels=[0, 1, 2, 20])}, "below 20, found 0 to 20"),
        ({"train": changed_split(coarse_labels=[0, 1, 2])}, r"coarse_labels .* found int64 \[3\]"),
        ({"train": changed_split(fine_labels=[b"0", b"1", b"2", b"3"])}, "fine_labels .* whole numbers"),
        ({"train": changed_split(fine_labels=[[0], [1, 2], [3], [3]])}, "found a ragged list"),
        ({"test": python2_pickle({b"data": np.zeros((1, 3072), "u1")})}, "test has no fine_labels"),
        ({"test": python2_pickle({b"data": 0, b"fine_labels": 0})}, "test has no coarse_labels"),
        ({"test": python2_pickle([1, 2])}, "pickle test was refused: it holds a list"),
        ({"test": cifar100_files(4, 3)["test"][:-100]}, "pickle test was refused"),
        ({"meta": python2_pickle({b"fine_label_names": [b"cat"]})}, "fine_label_names in meta are not those"),
        ({"meta": python2_pickle({b"fine_label_names": 7})}, "fine_label_names in meta are not those"),
        (
            {"meta": cifar100_files(4, 3)["meta"].replace(b"fish", b"fush")},
            "label_names in meta are not those",
        ),
    ],
)
def test_damaged_members(changes, message, tmp_path, load):
    with pytest.raises(DataError, match=message) as caught:
        load(pack(tmp_path, **changes))
    assert ARCHIVE in str(caught.value) and HOMEPAGE in str(caught.value)


def test_empty_split(tmp_path, load):
    empty = {"data": np.zeros((1, 3072), "u1")[:0], "fine_labels": [], "coarse_labels": []}
    with pytest.raises(DataError, match=r"train (holds no images|was refused)"):
        load(pack(tmp_path, train=changed_split(**empty)))


def test_nothing_is_executed(tmp_path, load):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    hostile = pickle.dumps({"data": Payload()}, protocol=2)
    with pytest.raises(DataError, match=r"pickle train was refused: it refers to \w+\.system"):
        load(pack(tmp_path, train=hostile))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("prefix", ["../", "/", "cifar-100-python/../../", "./"])
def test_members_elsewhere_are_not_taken_nor_written(prefix, tmp_path, load):
    members = [member(f"{prefix}{FOLDER}/{name}", content) for name, content in cifar100_files(4, 3).items()]
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=f"no {FOLDER}/train"):
        load(write_archive(tmp_path / "in" / ARCHIVE, members))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_refused(kind, tmp_path, load):
    files = cifar100_files(4, 3)
    members = [member("secret", files["train"])]
    members += [member(f"{FOLDER}/{name}", files[name]) for name in ("test", "meta")]
    members.append(member(f"{FOLDER}/train", type=kind, linkname="secret"))
    with pytest.raises(DataError, match=f"{FOLDER}/train is not a regular file"):
        load(write_archive(tmp_path / ARCHIVE, members))


@pytest.mark.parametrize("name", [f"{FOLDER}/train", "padding"])
def test_large_members_are_refused_before_they_are_read(name, tmp_path, load, monkeypatch):
    monkeypatch.setattr(module._BoundedReader, "read", lambda self, size: self.stream.read(size))
    header = tarfile.TarInfo(name)
    header.size = module.MAX_BYTES + 1
    path = tmp_path / ARCHIVE
    path.write_bytes(gzip.compress(header.tobuf() + bytes(10_240)))
    with pytest.raises(DataError, match="unpacks to more than 512 MiB"):
        load(path)


def test_endless_archives_are_refused(tmp_path, load, monkeypatch):
    """Neither many members nor an extended header as large as a disk gets past the limit."""
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)
    many = write_archive(tmp_path / "many.tar.gz", [member(f"padding{i}", bytes(1 << 18)) for i in range(5)])
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        load(many)
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "header.tar.gz").write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(8 << 20)))
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        load(tmp_path / "header.tar.gz")


def test_large_files_of_the_extracted_folder_are_refused(tmp_path, load, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)
    (tmp_path / FOLDER).mkdir()
    for name, content in cifar100_files(4, 3).items():
        (tmp_path / FOLDER / name).write_bytes(content)
    os.truncate(tmp_path / FOLDER / "test", (1 << 20) + 1)
    with pytest.raises(DataError, match=r"test is larger than 1 MiB"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 0.3, 0.9, -9, -1])
def test_truncated_archives(keep, archive, load):
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=rf"{ARCHIVE} (cannot be read|has no)"):
        load(archive)


def test_a_corrupted_stream(tmp_path, load):
    path = pack(tmp_path, train=changed_split(data=np.zeros((4000, 3072), "u1")))
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = bytes(byte ^ 0xFF for byte in whole[middle : middle + 100])
    path.write_bytes(whole[:middle] + flipped + whole[middle + 100 :])
    with pytest.raises(DataError, match=f"{ARCHIVE} cannot be read as a .tar.gz archive: Error -3"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"<html>404</html>", gzip.compress(b"not a tar archive" * 100)], ids=["page", "gzip"]
)
def test_not_an_archive_at_all(content, tmp_path, load):
    (tmp_path / ARCHIVE).write_bytes(content)
    with pytest.raises(DataError, match=f"{ARCHIVE} cannot be read as a .tar.gz archive"):
        load(tmp_path)


def test_random_damage_raises_nothing_else(tmp_path):
    """Flips bits where they hurt: in the tar headers, the pickles' instructions and the compressed stream."""
    rng = random.Random(0)
    with gzip.open(pack(tmp_path)) as file:
        whole = file.read()
    with tarfile.open(fileobj=io.BytesIO(whole)) as opened:
        starts = [info.offset for info in opened]
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole)
        for start in rng.sample(starts, 2):
            damaged[start + rng.randrange(700)] ^= 1 << rng.randrange(8)
        packed = bytearray(gzip.compress(damaged, 1))
        if trial % 3 == 0:
            packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
        path = tmp_path / "damaged.tar.gz"
        path.write_bytes(packed)
        builder = Cifar100(cache_dir=tmp_path, data_dir=str(path), verify_checksum=False)
        try:
            builder._split_generators(None)
        except DataError:
            refused += 1
    assert refused > 75
