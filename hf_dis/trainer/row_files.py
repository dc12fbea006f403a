"""Files of a sharded head in the format of safetensors: each process writes its rows into their place of one file.

Nothing is gathered, and the file holds whole tensors. So any number of processes can read the file, and so can
``from_pretrained``. The folder has to be one that all processes see, as for every checkpoint of several processes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hf_dis.distributed.processes import process_index, wait_for_everyone
from hf_dis.errors import DataError
from hf_dis.head.vocab_shard import VocabShard

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
# Bytes that are brought from the device of the rows at a time.
BLOCK_BYTES = 2**26


def write_rows(path: str | Path, rows: dict[str, Tensor], shard: VocabShard, num_rows: int) -> None:
    """Writes tensors whose rows are spread over processes; every process of the run has to call it.

    The file appears under its name when all processes have written.

    Args:
        path: of the file.
        rows: the rows of this process by name, ``[S, ...]``, with the same names and types on every process.
        shard: the rows that these are.
        num_rows: of all processes.

    Raises:
        FileNotFoundError: if this process does not see the folder that the first process writes to.
    """
    part, names = Path(f"{path}.part"), sorted(rows)
    header, starts = _header({name: rows[name] for name in names}, num_rows)
    if process_index() == 0:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(header)
            file.truncate(starts[-1])
    wait_for_everyone()
    if not part.is_file():
        raise FileNotFoundError(
            f"{part} is not there for process {process_index()}, and the first process has made it: save to a folder "
            "that the processes of all machines share"
        )
    with part.open("r+b") as file:
        for name, start in zip(names, starts, strict=False):
            values = rows[name].detach()
            file.seek(start + shard.start * _row_bytes(values))
            for block in values.split(max(1, BLOCK_BYTES // max(1, _row_bytes(values)))):
                file.write(block.cpu().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    wait_for_everyone()
    if process_index() == 0:
        os.replace(part, path)
    wait_for_everyone()


def read_rows(path: str | Path, shard: VocabShard, num_rows: int) -> dict[str, Tensor]:
    """Reads the rows of this process from a file that any number of processes wrote.

    Args:
        path: of the file.
        shard: the rows to read.
        num_rows: that the file has to have.

    Returns:
        the rows by name, ``[S, ...]``.

    Raises:
        DataError: if the file is missing, or has a different number of rows.
    """
    if not Path(path).is_file():
        raise DataError(
            f"{path} is missing, which holds the rows of a sharded head: resume from another checkpoint, or copy the "
            "file from where it was written"
        )
    found = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file of safetensors is no mapping
            values = file.get_slice(name)
            if values.get_shape()[0] != num_rows:
                raise DataError(
                    f"{name} has {values.get_shape()[0]} rows in {path}, and the head has {num_rows} classes: resume "
                    "with the number of classes that the checkpoint was saved with"
                )
            found[name] = values[shard.start : shard.stop]
    return found


def _header(rows: dict[str, Tensor], num_rows: int) -> tuple[bytes, list[int]]:
    """The first bytes of a file, where each tensor starts, and where the file ends."""
    entries, offset, offsets = {"__metadata__": {"format": "pt"}}, 0, []
    for name, values in rows.items():
        size = num_rows * _row_bytes(values)
        shape = [num_rows, *values.shape[1:]]
        entries[name] = {"dtype": TYPES[values.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offsets.append(offset)
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [first + one for one in (*offsets, offset)]


def _row_bytes(values: Tensor) -> int:
    return values[:1].numel() * values.itemsize
