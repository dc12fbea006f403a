"""Helpers of the readers' fuzzers: damage to bytes, and a watch on files that are written and programs that run."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def examples(number: int) -> settings:
    """Settings of a fuzzer: the number of examples, which are the same in every run."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """``content`` with bits flipped, bytes written over, stretches lost, repeated or put in, or its end missing."""
    changed = bytearray(content)
    kinds = ["flip", "write", "ones", "zeros"]
    if draw(st.booleans()):  # moves the bytes after it
        kinds += ["lose", "repeat", "insert", "end"]
    for _ in range(draw(st.integers(1, 4))):
        if not changed:
            break
        place = draw(st.integers(0, len(changed) - 1))
        stretch = slice(place, place + draw(st.sampled_from([1, 2, 4, 8, 64, 512])))
        kind = draw(st.sampled_from(kinds))
        if kind == "flip":
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "write":
            written = draw(st.binary(min_size=1, max_size=8))[: len(changed) - place]
            changed[place : place + len(written)] = written
        elif kind in ("ones", "zeros"):
            changed[stretch] = (b"\xff" if kind == "ones" else b"\0") * len(changed[stretch])
        elif kind == "lose":
            del changed[stretch]
        elif kind == "repeat":
            changed[place:place] = changed[stretch]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            del changed[place:]
    return bytes(changed)


NAMES = ["../evil", "/tmp/evil", "a/../../evil", "C:\\evil", "evil\0", "", ".", "..", "~", "\udcff", "e" * 300, "CON"]


def write_archive(name: str, content: bytes) -> Callable[[Path], Path]:
    """Returns a function that writes an archive of this name into a folder and returns its path."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def put(file: Path, content: bytes | str, huge: int) -> None:
    """Writes bytes to a file, or puts the thing that a text names in its place; ``huge`` is a size in bytes."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "a folder":
        file.mkdir(exist_ok=True)
    elif content == "nothing" or file.is_dir():
        return
    elif content == "a pipe":
        os.mkfifo(file)
    elif content == "a huge file":
        with file.open("wb") as opened:
            opened.truncate(huge)
    else:
        file.symlink_to({"a loop": file, "a link": "/etc/passwd", "a device": "/dev/zero"}[content])


class Payload:
    """Runs a function of the standard library when a pickle of it is read."""

    def __init__(self, function: Any, *arguments: Any):
        self.called = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.called


@st.composite
def pickles(draw, keys: list[str]) -> bytes:
    """A pickled dictionary with some of these keys and any plain values, among them payloads."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=8) | st.text(max_size=8)
    payloads = st.sampled_from([Payload(os.system, "true"), Payload(eval, "1"), Payload(os.mkdir, "evil")])
    values = st.recursive(leaves | payloads, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner))
    content = draw(st.dictionaries(st.sampled_from(keys), values) | st.lists(values, max_size=3))
    return pickle.dumps(content, protocol=draw(st.integers(0, pickle.HIGHEST_PROTOCOL)))


# Audit events of Python (https://docs.python.org/3/library/audit_events.html) that a reader must not raise.
RUN = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"}
RUN |= {"pickle.find_class", "socket.connect", "ctypes.dlopen"}
WRITTEN = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_watched: list[tuple[Path, list[str]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    folder, seen = _watched[-1]
    if event in RUN:
        seen.append(f"{event} {arguments}")
    elif event in WRITTEN or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        named = arguments[: 1 if event == "open" else 2]
        paths = [Path(os.fsdecode(path)) for path in named if isinstance(path, (str, bytes, os.PathLike))]
        if not all(path.resolve().is_relative_to(folder) for path in paths):
            seen.append(f"{event} {arguments}")


sys.addaudithook(_audit)  # stays until the exit: Python cannot remove an audit hook


@contextmanager
def nothing_run_or_written_but_in(folder: Path) -> Iterator[None]:
    """Asserts that Python runs no program in the context, and changes files in this folder only."""
    _watched.append((folder.resolve(), []))
    try:
        yield
    finally:
        _, seen = _watched.pop()
    assert seen == []
