"""The folder of a cache that is being written: files that are whole or missing, so that any run can continue it.

A note beside each shard holds its size and checksum until the cache is complete; then the header holds them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from hf_dis.cache.card import cache_card
from hf_dis.cache.header import HEADER, CacheHeader, Shard, shard_file
from hf_dis.cache.reader import SCHEMA, checked, checksum
from hf_dis.errors import DataError


class CacheFolder:
    """Writes the files of a cache.

    Args:
        path: of the folder; created by :meth:`begin`.
        header: of the cache, without shards.
    """

    def __init__(self, path: Path, header: CacheHeader):
        self.path, self.header = path, header

    def begin(self, show_progress: bool = True) -> None:
        """Writes a header without shards, and a note beside each shard that is whole; call it on one process.

        Args:
            show_progress: show a progress bar while the shards that are there are checked.

        Raises:
            DataError: if the folder holds another cache, or shards without a header.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / HEADER).exists():
            if found := sorted(file.name for file in self.path.glob("shard-*")):
                raise DataError(
                    f"{self.path} holds {found[0]} but no {HEADER}, which would name its teacher: give another "
                    "output_dir, or empty the folder"
                )
            _replace(self.path / HEADER, self.header.to_json().encode())
            return
        found = CacheHeader.load(self.path)
        if differences := found.differences(self.header):
            raise DataError(
                f"{self.path} holds another cache: {'; '.join(differences)} (here: in the folder; there: to be "
                "written). Give another output_dir, or empty the folder"
            )
        self.header = dataclasses.replace(self.header, teacher=found.teacher)  # by the name of the first call
        listed = {shard.file: shard for shard in found.shards}
        noted = [self._noted(number) or listed.get(shard_file(number)) for number in range(self.header.num_shards)]
        there = [shard for shard in noted if shard is not None]
        whole = {shard.file for shard in checked(there, show_progress) if self._is_whole(shard)}
        for number, shard in enumerate(noted):
            if shard is not None and shard.file in whole:
                self._write_note(number, shard)
            else:
                self._note(number).unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """The numbers of the shards that are still to be written."""
        return [number for number in range(self.header.num_shards) if not self._note(number).is_file()]

    def write(self, number: int, keys: list[int], counts: list[int], targets: np.ndarray) -> None:
        """Writes a shard.

        Args:
            number: of the shard.
            keys: of its examples.
            counts: items of each example.
            targets: of all items, uint8 ``[items, item_bytes]``.

        Raises:
            DataError: if the targets take 2 GiB or more.
        """
        if targets.nbytes >= 2**31:
            raise DataError(
                f"the targets of shard {number} take {targets.nbytes:,} bytes, and Arrow needs less than 2 GiB: lower "
                f"shard_examples, which is {self.header.shard_examples}"
            )
        offsets = (np.cumsum([0, *counts]) * targets.shape[1]).astype(np.int32)
        column = pa.BinaryArray.from_buffers(
            pa.binary(), len(keys), [None, pa.py_buffer(offsets), pa.py_buffer(targets.tobytes())]
        )
        table = pa.table([pa.array(keys, pa.int64()), column], schema=SCHEMA)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        file = self.path / shard_file(number)
        shard = Shard(file.name, len(keys), len(targets), len(content), xxhash.xxh3_128(content).hexdigest())
        # The note comes first, so a shard that is whole always has one and is never written again.
        self._write_note(number, shard)
        _replace(file, content)

    def finish(self, license: Mapping[str, str]) -> None:
        """Writes the README and the complete header, and removes the notes; call it on one process.

        Args:
            license: of the teacher's checkpoint, for the README.
        """
        notes = [self._note(number) for number in range(self.header.num_shards)]
        shards = [Shard(**json.loads(note.read_text())) for note in notes]
        complete = dataclasses.replace(self.header, shards=shards)
        _replace(self.path / "README.md", cache_card(complete, license).encode())
        _replace(self.path / HEADER, complete.to_json().encode())
        for note in notes:
            note.unlink()

    def _note(self, number: int) -> Path:
        return (self.path / shard_file(number)).with_suffix(".json")

    def _write_note(self, number: int, shard: Shard) -> None:
        _replace(self._note(number), json.dumps(dataclasses.asdict(shard)).encode())

    def _noted(self, number: int) -> Shard | None:
        """Reads the note beside a shard; None if it is missing or damaged, then the shard is written again."""
        try:
            shard = Shard(**json.loads(self._note(number).read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return shard if shard.file == shard_file(number) else None

    def _is_whole(self, shard: Shard) -> bool:
        file = self.path / shard.file
        return file.is_file() and file.stat().st_size == shard.num_bytes and checksum(file) == shard.xxh3_128


def _replace(path: Path, content: bytes | pa.Buffer) -> None:
    """Writes a file so that it is whole or as before, whenever the process or the machine stops."""
    partial = path.with_suffix(f"{path.suffix}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
