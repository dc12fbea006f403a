"""A cache of teacher targets on disk: its header, its checks, and the look-up of a batch's examples.

A cache is a folder that ``datasets.load_dataset`` opens and the Hub holds as it is: ``cache.json``, the header, and
shards in Arrow's stream format with the columns ``key`` (int64, see :mod:`hf_dis.data.keys`) and ``targets``
(binary: the rows of the example, one after another, as :class:`hf_dis.compact.TargetLayout` lays them out).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from huggingface_hub import HfApi
from torch import Tensor

from hf_dis.compact import TargetLayout
from hf_dis.data.errors import DataError
from hf_dis.data.keys import content_keys

FORMAT_VERSION = 1
HEADER = "cache.json"
CARD = """---
tags: [hf_dis, knowledge-distillation]
configs:
- config_name: default
  data_files: "*.arrow"
---
# Teacher targets

What {header.teacher[name]} answers about {header.dataset[examples]:,} examples at temperature {header.temperature:g}:
of each of {rows:,} rows the {header.depth} likeliest of {header.num_classes:,} classes with their log-probabilities,
and {header.tail_draws} classes ({header.tail}) that stand for all others; {row_bytes} bytes a row, {num_bytes:,} in
all. Written by hf_dis; `hf_dis.TeacherCache` reads it, and `{HEADER}` says what made it.
""".replace("{HEADER}", HEADER)
# The column of a batch that holds its examples' targets.
TARGETS = "teacher_targets"
# Fills up examples with fewer rows than others of their batch.
FILLER = 255


@dataclass(frozen=True)
class Shard:
    """A file of a cache.

    Attributes:
        file: its name.
        examples, rows: how many it holds.
        num_bytes: its size.
        xxh3_128: checksum of its content.
    """

    file: str
    examples: int
    rows: int
    num_bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class CacheHeader:
    """What a cache says of itself.

    Attributes:
        num_classes: C.
        temperature: τ.
        depth: m, ranked classes of a row.
        tail_draws: T, classes drawn from its tail.
        tail: how these were drawn, see :mod:`hf_dis.compact`.
        seed: of the tail's draws.
        teacher: ``name``, ``revision`` (a commit of the Hub, if known) and ``weights`` (sha256).
        labels: sha256 of the classes' names, None if they have none.
        tokenizer: sha256 of the vocabulary, None if there was none.
        inputs: names of the inputs that the teacher was given, which make up an example's key.
        dataset: ``examples`` and ``fingerprint`` (a digest of keys of some).
        views: ``number`` and ``seed`` of :class:`hf_dis.data.SeededViews`, None without augmentation.
        shard_examples: examples a shard, the last one's aside.
        shards: the files; empty while the cache is being written.
    """

    num_classes: int
    temperature: float
    depth: int
    tail_draws: int
    tail: str
    seed: int
    teacher: dict[str, str | None]
    labels: str | None
    tokenizer: str | None
    inputs: list[str]
    dataset: dict[str, int | str]
    views: dict[str, int] | None
    shard_examples: int
    shards: list[Shard] = field(default_factory=list)

    @property
    def layout(self) -> TargetLayout:
        return TargetLayout(self.num_classes, self.depth, self.tail_draws)

    @property
    def num_shards(self) -> int:
        return -(-self.dataset["examples"] // self.shard_examples)

    def differences(self, other: CacheHeader) -> list[str]:
        """What sets two caches apart, but for the shards that are there."""
        mine, others = (dataclasses.asdict(header) for header in (self, other))
        return [
            f"{name} is {mine[name]!r} here and {others[name]!r} there"
            for name in mine
            if name != "shards" and mine[name] != others[name]
        ]

    def card(self) -> str:
        """The page of the cache as a data set of the Hub, with what ``datasets`` has to know."""
        rows = sum(shard.rows for shard in self.shards)
        return CARD.format(header=self, row_bytes=self.layout.row_bytes, rows=rows, num_bytes=self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> str:
        content = {"format": "hf_dis teacher cache", "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> CacheHeader:
        """Reads the header of the cache in a folder.

        Raises:
            DataError: if there is none, it is damaged, or this version cannot read it.
        """
        file = path / HEADER
        try:
            content = dict(json.loads(file.read_text()))
            version = content.pop("version")
            if not isinstance(version, int) or content.pop("format") != "hf_dis teacher cache":
                raise ValueError("it is another kind of file")
        except FileNotFoundError as error:
            raise DataError(
                f"there is no teacher cache in {path}: it has no {HEADER}; write one with cache_teacher_targets or "
                "examples/cache_teacher.py"
            ) from error
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(f"{file} is damaged ({error}): copy it again, or write the cache again") from error
        if version > FORMAT_VERSION:
            raise DataError(
                f"{path} is written in format {version}, and this version of hf_dis reads up to {FORMAT_VERSION}: "
                "upgrade hf_dis"
            )
        checksum = content.pop("checksum", None)
        if checksum != _checksum({"format": "hf_dis teacher cache", "version": version, **content}):
            raise DataError(f"{file} is damaged: its checksum is another; copy it again, or write the cache again")
        return CacheHeader(**{**content, "shards": [Shard(**shard) for shard in content["shards"]]})


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        self._shards = [_ShardReader(self.path, shard, verify) for shard in self.header.shards]
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
        """The stored targets of a batch's examples: uint8, ``[B, R, layout.row_bytes]``, R the most rows that one has;
        :func:`stored_rows` takes out what fills up the others.

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
        for row, part in zip(found, parts, strict=True):
            row[: len(part)] = part
        return torch.from_numpy(found).unflatten(1, (-1, self.header.layout.row_bytes))

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


def stored_rows(found: Tensor) -> Tensor:
    """The rows of all examples, one after another, of what :meth:`TeacherCache.look_up` found: ``[rows, bytes]``."""
    # A row ends with a float32, which is NaN where its last bytes are all ones.
    return found[(found[..., -2:] != FILLER).any(-1)]


class _ShardReader:
    """One shard, mapped into memory."""

    def __init__(self, folder: Path, shard: Shard, verify: bool):
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
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.keys = table["key"].to_numpy()
        column = table["targets"].combine_chunks()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        _, offsets, data = column.buffers()
        self._offsets = np.frombuffer(offsets, np.int32, len(column) + 1, column.offset * 4)
        self._data = np.frombuffer(data, np.uint8)

    def targets(self, example: int) -> np.ndarray:
        return self._data[self._offsets[example] : self._offsets[example + 1]]


def checksum(path: Path) -> str:
    """xxh3_128 of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
