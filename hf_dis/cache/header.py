"""The header of a cache of teacher targets: how the targets were made, and the files that hold them.

The header is JSON and may come from an untrusted place. Every value that is read has to be of the type and within the
range that this package writes. A header names no file but the shards of its own folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from hf_dis.checks import require
from hf_dis.errors import DataError
from hf_dis.teacher.compact import STORED_DESIGNS, TargetLayout

# Version 1 left the place of the supervised tokens out of the keys, so its caches may hold targets of other tokens.
FORMAT, FORMAT_VERSION = "hf_dis teacher cache", 2

HEADER = "cache.json"

# Largest number of classes that an id can count.
MAX_CLASSES = 2**31


@dataclass(frozen=True)
class Shard:
    """A file of a cache.

    Attributes:
        file: name of the file.
        examples, items: how many the file holds.
        num_bytes: size of the file.
        xxh3_128: checksum of the file's content.

    Raises:
        ValueError: if a value is not of its type or is below 0.
    """

    file: str
    examples: int
    items: int
    num_bytes: int
    xxh3_128: str

    def __post_init__(self) -> None:
        require(isinstance(self.file, str), "file", self.file, "a name")
        for name in ("examples", "items", "num_bytes"):
            _require_whole(name, getattr(self, name), 0)
        require(isinstance(self.xxh3_128, str), "xxh3_128", self.xxh3_128, "a checksum")


@dataclass(frozen=True)
class CacheHeader:
    """The settings of a cache and its shards.

    Attributes:
        num_classes: C, from 1 to 2^31.
        temperature: τ > 0.
        depth: m, ranked classes of an item, from 0 to C.
        sample_size: T >= 0, classes of an item's stored sample.
        design: how the stored sample was taken, see :mod:`hf_dis.teacher.compact`.
        seed: of the stored samples.
        teacher: ``name``, ``revision`` (a commit of the Hub, if known) and ``weights`` (xxh3_128).
        labels: sha256 of the classes' names; None if they have none.
        tokenizer: sha256 of the vocabulary; None if there was no tokenizer.
        inputs: names of the inputs that make up an example's key, see :mod:`hf_dis.cache.keys`.
        dataset: ``examples``, their number, and ``fingerprint``, a digest of some keys.
        views: ``number`` and ``seed`` of :class:`hf_dis.cache.SeededViews`; None for other datasets.
        shard_examples: examples per shard; the last shard may have fewer.
        shards: the files; empty while the cache is being written.

    Raises:
        ValueError: if a value is not of its type or out of its range.
    """

    num_classes: int
    temperature: float
    depth: int
    sample_size: int
    design: str
    seed: int
    teacher: dict[str, str | None]
    labels: str | None
    tokenizer: str | None
    inputs: list[str]
    dataset: dict[str, int | str]
    views: dict[str, int] | None
    shard_examples: int
    shards: list[Shard] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, lowest in (("num_classes", 1), ("depth", 0), ("sample_size", 0), ("shard_examples", 1)):
            _require_whole(name, getattr(self, name), lowest)
        require(self.num_classes <= MAX_CLASSES, "num_classes", self.num_classes, f"at most {MAX_CLASSES:,}")
        require(self.depth <= self.num_classes, "depth", self.depth, f"at most num_classes, {self.num_classes}")
        require(isinstance(self.seed, int), "seed", self.seed, "a whole number")
        is_number = isinstance(self.temperature, (int, float)) and 0 < self.temperature <= sys.float_info.max
        require(is_number, "temperature", self.temperature, "a number above 0 and finite")
        require(self.design in STORED_DESIGNS, "design", self.design, f"one of {', '.join(STORED_DESIGNS)}")
        _require_fields("teacher", self.teacher, {"name": str, "revision": (str, NoneType), "weights": str})
        for name in ("labels", "tokenizer"):
            require(isinstance(getattr(self, name), (str, NoneType)), name, getattr(self, name), "a digest or None")
        is_list = isinstance(self.inputs, list) and all(isinstance(name, str) for name in self.inputs)
        require(is_list and len(self.inputs) > 0, "inputs", self.inputs, "a list of names")
        _require_fields("dataset", self.dataset, {"examples": int, "fingerprint": str})
        require(self.dataset["examples"] >= 1, "examples", self.dataset["examples"], "1 or more")
        if self.views is not None:
            _require_fields("views", self.views, {"number": int, "seed": int})
        for number, shard in enumerate(self.shards):
            require(shard.file == shard_file(number), "file", shard.file, f"{shard_file(number)}, by its place")
            expected = min(self.shard_examples, self.dataset["examples"] - number * self.shard_examples)
            require(shard.examples == expected, f"examples of {shard.file}", shard.examples, f"{expected}")

    @property
    def layout(self) -> TargetLayout:
        """The layout of an item's targets in bytes."""
        return TargetLayout(self.num_classes, self.depth, self.sample_size)

    @property
    def num_shards(self) -> int:
        """The number of shards of the whole cache, written or not."""
        return -(-self.dataset["examples"] // self.shard_examples)

    @property
    def num_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def examples_of(self, shard: int) -> range:
        """The indices in the dataset of the examples of a shard."""
        return range(shard * self.shard_examples, min((shard + 1) * self.shard_examples, self.dataset["examples"]))

    def differences(self, other: CacheHeader) -> list[str]:
        """Describes every field in which two caches differ, shards left out; one text per field.

        A teacher is the same if its weights are, whatever its name: a checkpoint may have moved.
        """
        mine, theirs = (dataclasses.asdict(header) for header in (self, other))
        same = {"shards"} | ({"teacher"} if self.teacher["weights"] == other.teacher["weights"] else set())
        return [
            f"{name} is {mine[name]!r} here and {theirs[name]!r} there"
            for name in mine
            if name not in same and mine[name] != theirs[name]
        ]

    def to_json(self) -> str:
        """The content of the header's file, with a checksum."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> CacheHeader:
        """Reads the header of the cache in a folder.

        Raises:
            DataError: if there is no header, or it is damaged, or it is of an older or newer format.
        """
        file = path / HEADER
        try:
            content = dict(json.loads(file.read_text()))
            kind, version = content["format"], content["version"]
            require(kind == FORMAT, "format", kind, repr(FORMAT))
            _require_whole("version", version, 1)
            if version == FORMAT_VERSION:
                checksum = content.pop("checksum")
                require(checksum == _checksum(content), "checksum", checksum, _checksum(content))
                fields = {name: value for name, value in content.items() if name not in ("format", "version")}
                return CacheHeader(**{**fields, "shards": [Shard(**shard) for shard in fields["shards"]]})
        except FileNotFoundError as error:
            raise DataError(
                f"there is no teacher cache in {path}: it has no {HEADER}; write one with cache_teacher_targets or "
                "examples/cache_teacher.py"
            ) from error
        except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
            raise DataError(f"{file} is damaged ({error}): copy it again, or write the cache again") from error
        if version < FORMAT_VERSION:
            raise DataError(
                f"{path} is written in format {version}, and this version of hf_dis reads format {FORMAT_VERSION}: "
                "write the cache again with cache_teacher_targets, in another folder or after deleting this one"
            )
        raise DataError(
            f"{path} is written in format {version}, and this version of hf_dis reads up to {FORMAT_VERSION}: "
            "upgrade hf_dis"
        )


def shard_file(number: int) -> str:
    """The name of a shard's file."""
    return f"shard-{number:06}.arrow"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_whole(name: str, value: Any, lowest: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    require(is_whole and value >= lowest, name, value, f"a whole number, {lowest} or more")


def _require_fields(name: str, value: Any, types: dict[str, type | tuple[type, ...]]) -> None:
    """Raises ValueError unless the value is a dictionary of exactly these fields, each of its type."""
    holds = isinstance(value, dict) and value.keys() == types.keys()
    holds = holds and all(isinstance(value[key], kind) for key, kind in types.items())
    require(holds, name, value, f"a dictionary with {', '.join(types)}")
