"""Hand-made CIFAR-100 archives in the official format, for tests: pickled the way Python 2 did it."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hf_dis.data.cifar100 import ARCHIVE, COARSE_NAMES, FINE_NAMES, FOLDER


def python2_pickle(value: Any) -> bytes:
    """Pickles dicts, lists, ints, byte strings and arrays with the opcodes of Python 2's protocol 2."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    match value:
        case dict():
            return b"}(" + b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(_opcodes, value)) + b"e"
        case int():
            return b"J" + struct.pack("<i", value)
        case bytes():
            return b"T" + struct.pack("<i", len(value)) + value
        case np.ndarray():
            code, order = value.dtype.str[1:].encode(), value.dtype.str[:1].encode()
            placeholder = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            dtype = b"cnumpy\ndtype\n" + _opcodes(code) + b"K\x00K\x01\x87R"
            dtype += b"(K\x03" + _opcodes(order) + b"NNN" + _opcodes(-1) + _opcodes(-1) + b"K\x00tb"
            shape = b"(" + b"".join(_opcodes(size) for size in value.shape) + b"t"
            return placeholder + b"(K\x01" + shape + dtype + b"\x89" + _opcodes(value.tobytes()) + b"tb"
        case _:
            raise TypeError(type(value))


def cifar100_split(size: int, seed: int) -> dict[bytes, Any]:
    """A split with every class in turn, each with a colour pattern of its own under some noise."""
    patterns = np.random.default_rng(0).integers(0, 256, (len(FINE_NAMES), 3, 4, 4))
    noise = np.random.default_rng(seed).normal(0, 20, (size, 3, 32, 32))
    fine = np.arange(size) % len(FINE_NAMES)
    images = (patterns[fine].repeat(8, axis=2).repeat(8, axis=3) + noise).clip(0, 255).astype(np.uint8)
    return {
        b"filenames": [b"image_%05d.png" % number for number in range(size)],
        b"batch_label": b"made for tests",
        b"fine_labels": fine.tolist(),
        b"coarse_labels": (fine // 5).tolist(),
        b"data": images.reshape(size, 3072),
    }


def cifar100_files(train: int = 200, test: int = 100, seed: int = 0) -> dict[str, bytes]:
    """The content of the members train, test and meta."""
    meta = {
        b"fine_label_names": [name.encode() for name in FINE_NAMES],
        b"coarse_label_names": [name.encode() for name in COARSE_NAMES],
    }
    contents = {
        "train": cifar100_split(train, seed),
        "test": cifar100_split(test, seed + 1_000_000),
        "meta": meta,
    }
    return {name: python2_pickle(content) for name, content in contents.items()}


def member(name: str, content: bytes = b"", **header: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a tar archive; ``header`` sets fields such as ``type`` and ``linkname``."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    return info, content


def write_archive(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Writes a .tar.gz with exactly these entries, however unreasonable."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def write_cifar100_archive(folder: Path, train: int = 200, test: int = 100, seed: int = 0) -> Path:
    """Writes a small ``cifar-100-python.tar.gz`` into ``folder`` and returns its path.

    Its images can be learnt: classes differ in a colour pattern that train and test share. It is not the
    official archive, so it loads with ``verify_checksum=False`` only.
    """
    files = cifar100_files(train, test, seed)
    members = [member(f"{FOLDER}/{name}", content) for name, content in files.items()]
    folder_entry = member(FOLDER, type=tarfile.DIRTYPE, mode=0o755)
    return write_archive(Path(folder) / ARCHIVE, [folder_entry, *members])


def pack(folder: Path, **changes: bytes | None) -> Path:
    """An archive whose members train, test and meta are replaced, or dropped where None."""
    contents = {**cifar100_files(train=4, test=3), **changes}
    members = [member(f"{FOLDER}/{name}", content) for name, content in contents.items() if content is not None]
    return write_archive(folder / ARCHIVE, members)


def changed_split(**changes: Any) -> bytes:
    """The pickle of a split of four images with some of its entries replaced."""
    return python2_pickle({**cifar100_split(4, seed=0), **{key.encode(): value for key, value in changes.items()}})
