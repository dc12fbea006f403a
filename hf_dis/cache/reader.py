"""A cache of teacher targets on disk: its checks, and the look-up of a batch's examples.

A cache is a folder that ``datasets.load_dataset`` opens and the Hub holds as it is: ``cache.json``, the header (see
:mod:`hf_dis.data.cache_header`), and shards in Arrow's stream format with the columns ``key`` (int64, see
:mod:`hf_dis.data.keys`) and ``targets`` (binary: the items of the example, one after another, as
:class:`hf_dis.teacher.compact.TargetLayout` lays them out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from huggingface_hub import HfApi
from torch import Tensor

from hf_dis.cache.header import CacheHeader, Shard
from hf_dis.cache.keys import content_keys
from hf_dis.errors import DataError
from hf_dis.teacher.cached import FILLER, TARGETS

SCHEMA = pa.schema({"key": pa.int64(), "targets": pa.binary()})


class TeacherCache:
    """A complete cache, checked and open for look-ups; shards stay on disk, only their keys are in memory.

    Args:
        path: of the folder.
        verify: compare every shard with its checksum, which reads all of them once.

    Attributes:
        path: as given.
        header: what the cache says of itself.

    Raises:
        DataError: if the cache is missing, half-written, damaged, or of a newer format; says which and what to do.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.path = Path(path)
        self.header = CacheHeader.load(self.path)
        if len(self.header.shards) != self.header.num_shards:
            written = len(list(self.path.glob("*.arrow")))
            raise DataError(
                f"the cache in {path} is half-written: {written} of {self.header.num_shards} shards are there. Run "
                "what wrote it again with the same arguments: it goes on where it stopped"
            )
        item_bytes = self.header.layout.item_bytes
        self._shards = [_ShardReader(self.path, shard, item_bytes, verify) for shard in self.header.shards]
        keys = np.concatenate([shard.keys for shard in self._shards])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._first = np.cumsum([0, *(len(shard.keys) for shard in self._shards)])

    def __reduce__(self):
        return partial(TeacherCache, verify=False), (self.path,)

    def __len__(self) -> int:
        """Examples in the cache."""
        return len(self._keys)

    def look_up(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The stored targets of a batch's examples: uint8, ``[B, R, layout.item_bytes]``, R the most items that one has;
        :func:`stored_items` takes out what fills up the others.

        Raises:
            DataError: if the teacher was not given one of them when the cache was written.
        """
        keys = np.array(content_keys(batch, self.header.inputs), dtype=np.int64)
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        missing = np.flatnonzero(self._keys[place] != keys)
        if len(missing):
            views = self.header.views
            made_of = "un-augmented examples" if views is None else f"SeededViews of seed {views['seed']}"
            raise DataError(
                f"{len(missing)} of {len(keys)} examples are not in the cache {self.path}, the first at "
                f"{missing[0]} of the batch: it holds {made_of}, and only what the teacher was given then. Train on "
                "the same data set, prepared and tokenized in the same way, without augmentation at random"
            )
        examples = self._order[place]
        shards = np.searchsorted(self._first, examples, side="right") - 1
        parts = [
            self._shards[shard].targets(example - self._first[shard])
            for shard, example in zip(shards, examples, strict=True)
        ]
        found = np.full((len(parts), max(map(len, parts))), FILLER, np.uint8)
        for item, part in zip(found, parts, strict=True):
            item[: len(part)] = part
        return torch.from_numpy(found).unflatten(1, (-1, self.header.layout.item_bytes))

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the folder as a data set of the Hub, which is made if it is not there; returns its address.

        ``TeacherCache(huggingface_hub.snapshot_download(repo_id, repo_type="dataset"))`` opens it elsewhere.
        """
        api = HfApi(token=token)
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=self.path, repo_type="dataset")
        return str(url)

    def collator(self, collate: Callable[[Any], Mapping[str, Any]]) -> CachedCollator:
        """A data collator that puts the targets of a batch's examples beside what another makes of them."""
        return CachedCollator(collate, self)


@dataclass
class CachedCollator:
    """Collates, then adds the examples' targets as ``batch["teacher_targets"]``; works within dataloader workers."""

    collate: Callable[[Any], Mapping[str, Any]]
    cache: TeacherCache

    def __call__(self, features: Any) -> Mapping[str, Any]:
        batch = self.collate(features)
        batch[TARGETS] = self.cache.look_up(batch)
        return batch


class _ShardReader:
    """One shard, mapped into memory."""

    def __init__(self, folder: Path, shard: Shard, item_bytes: int, verify: bool):
        path = folder / shard.file
        if not path.is_file():
            raise DataError(
                f"the shard {shard.file} of the cache {folder} is missing: copy it again, or run what wrote the cache "
                "again with the same arguments, which writes what is missing"
            )
        if path.stat().st_size != shard.num_bytes or (verify and checksum(path) != shard.xxh3_128):
            raise DataError(
                f"the shard {path} is damaged: it is not what was written ({shard.num_bytes} bytes, xxh3_128 "
                f"{shard.xxh3_128}). Copy it again, or run what wrote the cache again with the same arguments, which "
                "writes what is damaged"
            )
        try:
            self.keys, self._offsets, self._data = _columns(path)
            lengths, expected = np.diff(self._offsets), (shard.examples, shard.items * item_bytes)
            if (len(lengths), lengths.sum()) != expected or (lengths % item_bytes).any():
                raise ValueError(
                    f"{shard.items} items of {shard.examples} examples are not {expected[1]} bytes in all"
                )
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(
                f"the shard {path} is none of a teacher cache, although its checksum is right: {error}. Copy it again "
                "from where the cache was written, or write the cache again"
            ) from error

    def targets(self, example: int) -> np.ndarray:
        return self._data[self._offsets[example] : self._offsets[example + 1]]


def _columns(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, offsets into the targets, and the targets' bytes of a shard; Arrow itself would believe any offset."""
    with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
        if stream.schema.remove_metadata() != SCHEMA:
            raise ValueError(f"its columns are {', '.join(map(str, stream.schema))}")
        table = stream.read_all()
    table.validate(full=True)
    if any(column.null_count for column in table.columns):
        raise ValueError("some of its values are missing")
    column = table["targets"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    _, offsets, data = column.buffers()
    offsets = np.frombuffer(offsets, np.int32, len(column) + 1, column.offset * 4)
    return table["key"].to_numpy(), offsets, np.frombuffer(data or b"", np.uint8)


def checksum(path: Path) -> str:
    """xxh3_128 of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
