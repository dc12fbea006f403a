"""A cache of teacher targets on disk: the checks when it is opened, and the look-up of a batch's examples.

A cache is a folder that ``datasets.load_dataset`` opens and that the Hub stores as it is. The folder holds
``cache.json``, the header (see :mod:`hf_dis.cache.header`), and shards in Arrow's stream format with two columns.
``key`` is int64, see :mod:`hf_dis.cache.keys`. ``targets`` is binary: the items of the example, one after another, as
:class:`hf_dis.teacher.compact.TargetLayout` lays them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from transformers.utils.logging import tqdm

from hf_dis.cache.header import CacheHeader, Shard
from hf_dis.cache.keys import content_keys, is_joined, restarts
from hf_dis.distributed.processes import process_index
from hf_dis.errors import DataError
from hf_dis.items import FILLER
from hf_dis.teacher.cached import TARGETS

# Seconds until a progress bar of checks appears: a small cache has none.
DELAY = 2.0
SCHEMA = pa.schema({"key": pa.int64(), "targets": pa.binary()})
# The remedy where a training packs examples and the cache holds unpacked ones.
PACKED = (
    "cache the packed dataset (trainer.train_dataset, with data_collator=trainer.data_collator), or set packing=False"
)


class TeacherCache:
    """A complete cache, checked and open for look-ups; shards stay on disk, only their keys are in memory.

    Args:
        path: of the folder.
        verify: compare every shard with its checksum, which reads all shards once.

    Attributes:
        path: as given.
        header: the settings of the cache.

    Raises:
        DataError: if the cache is missing, half-written, damaged, or of an older or newer format.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.path = Path(path)
        self.header = CacheHeader.load(self.path)
        if len(self.header.shards) != self.header.num_shards:
            written = len(list(self.path.glob("*.arrow")))
            raise DataError(
                f"the cache in {path} is half-written: {written} of {self.header.num_shards} shards are there. Run "
                "cache_teacher_targets again with the same arguments: it continues where it stopped"
            )
        item_bytes = self.header.layout.item_bytes
        shards = checked(self.header.shards) if verify else self.header.shards
        self._shards = [_ShardReader(self.path, shard, item_bytes, verify) for shard in shards]
        keys = np.concatenate([shard.keys for shard in self._shards])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._first = np.cumsum([0, *(len(shard.keys) for shard in self._shards)])

    def __reduce__(self):
        return partial(TeacherCache, verify=False), (self.path,)

    def __len__(self) -> int:
        """The number of examples in the cache."""
        return len(self._keys)

    def look_up(self, batch: Mapping[str, Any]) -> Tensor:
        """Looks up the stored targets of a batch's examples.

        Args:
            batch: as collated, on the CPU; its tensors are ``[B, ...]``.

        Returns:
            uint8 ``[B, R, layout.item_bytes]``, where R is the largest number of items of an example. Examples with
            fewer items are filled up; :func:`hf_dis.items.stored_items` takes the items out.

        Raises:
            DataError: if an example is not among those that the teacher was given when the cache was written.
        """
        keys = np.array(content_keys(batch, self.header.inputs), dtype=np.int64)
        if "position_ids" not in self.header.inputs and restarts(batch):
            raise DataError(
                "the batch packs several sequences into one example (its position_ids restart), and the cache "
                f"{self.path} holds examples that are not packed in this way: {PACKED}"
            )
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        missing = np.flatnonzero(self._keys[place] != keys)
        if len(missing):
            raise DataError(self._not_found(missing.tolist(), len(keys)))
        examples = self._order[place]
        shards = np.searchsorted(self._first, examples, side="right") - 1
        parts = [
            self._shards[shard].targets(example - self._first[shard])
            for shard, example in zip(shards, examples, strict=True)
        ]
        found = np.full((len(parts), max(map(len, parts))), FILLER, np.uint8)
        for example, part in zip(found, parts, strict=True):
            example[: len(part)] = part
        return torch.from_numpy(found).unflatten(1, (-1, self.header.layout.item_bytes))

    def _not_found(self, missing: list[int], num_examples: int) -> str:
        views = self.header.views
        held = "un-augmented examples" if views is None else f"SeededViews of seed {views['seed']}"
        message = (
            f"{len(missing)} of {num_examples} examples are not in the cache {self.path}, the first at index "
            f"{missing[0]} of the batch. The cache holds {held}, exactly as the teacher was given them. Train on the "
            "same dataset, prepared and tokenized in the same way, without random augmentation"
        )
        return f"{message}. If the training packs examples: {PACKED}" if "input_ids" in self.header.inputs else message

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the folder as a dataset of the Hub, which is created if needed.

        ``TeacherCache(huggingface_hub.snapshot_download(repo_id, repo_type="dataset"))`` opens the dataset elsewhere.

        Args:
            repo_id: name of the dataset, with or without its owner.
            private: create a private dataset; None: the default of the owner.
            token: of the Hub; None: the one that is stored on this machine.

        Returns:
            the address of the dataset.
        """
        api = HfApi(token=token)
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=self.path, repo_type="dataset")
        return str(url)

    def collator(self, collate: Callable[[Any], Mapping[str, Any]]) -> CachedCollator:
        """Wraps a data collator: the new one adds the targets of a batch's examples to the batch."""
        return CachedCollator(collate, self)


@dataclass
class CachedCollator:
    """Collates, then adds the examples' targets as ``batch["teacher_targets"]``; works within dataloader workers.

    A padding-free collator joins the examples of a batch into one. Each example is then collated alone too, and its
    targets are looked up by that.

    Args:
        collate: makes the batch.
        cache: holds the targets.

    Raises:
        DataError: if an example is not in the cache, or joined examples have no boundaries.
    """

    collate: Callable[[Any], Mapping[str, Any]]
    cache: TeacherCache

    def __call__(self, features: Any) -> Mapping[str, Any]:
        """Collates examples, and adds their targets."""
        batch = self.collate(features)
        if not (isinstance(features, list) and is_joined(batch, self.cache.header.inputs, len(features))):
            batch[TARGETS] = self.cache.look_up(batch)
            return batch
        if not restarts(batch):
            raise DataError(
                f"the collator joined {len(features)} examples into one sequence without position_ids that restart "
                "at each example, so the examples attend to each other. The cache holds targets of single examples: "
                "use a collator that makes position_ids (as TRL's does with padding_free=True) or pads, or set "
                "per_device_train_batch_size=1"
            )
        batch[TARGETS] = torch.cat([self.cache.look_up(self.collate([feature])) for feature in features], 1)
        return batch


def checked(shards: Sequence[Shard], show_progress: bool = True) -> Iterator[Shard]:
    """Yields shards whose checksums are compared, with a progress bar of their bytes on the first process.

    Args:
        shards: to be yielded; the bar counts a shard when the next one is asked for.
        show_progress: show the bar, where the checks take more than two seconds.
    """
    total, hidden = sum(shard.num_bytes for shard in shards), not show_progress or process_index() != 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="Checking the cache", delay=DELAY, disable=hidden) as bar:
        for shard in shards:
            yield shard
            bar.update(shard.num_bytes)


class _ShardReader:
    """One shard, mapped into memory."""

    def __init__(self, folder: Path, shard: Shard, item_bytes: int, verify: bool):
        path = folder / shard.file
        if not path.is_file():
            raise DataError(
                f"the shard {shard.file} of the cache {folder} is missing: copy it again, or run "
                "cache_teacher_targets again with the same arguments, which writes missing shards"
            )
        if path.stat().st_size != shard.num_bytes or (verify and checksum(path) != shard.xxh3_128):
            raise DataError(
                f"the shard {path} is damaged: its content differs from what was written ({shard.num_bytes} bytes, "
                f"xxh3_128 {shard.xxh3_128}). Copy it again, or run cache_teacher_targets again with the same "
                "arguments, which writes damaged shards"
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
                f"the file {path} is not a shard of a teacher cache, although its checksum is right: {error}. Copy it "
                "from where the cache was written, or write the cache again"
            ) from error

    def targets(self, example: int) -> np.ndarray:
        """The bytes of an example's items, one after another."""
        return self._data[self._offsets[example] : self._offsets[example + 1]]


def _columns(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads keys, offsets into the targets, and the targets' bytes of a shard.

    Arrow does not check offsets when it opens a file, so the table is validated in full.
    """
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
    """Computes xxh3_128 of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
