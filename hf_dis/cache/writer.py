"""Writing a cache of teacher targets: shard by shard, by any number of processes, from where it stopped."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, default_data_collator

from hf_dis.cache.header import HEADER, CacheHeader, Shard, shard_file
from hf_dis.cache.keys import content_keys, key_inputs
from hf_dis.cache.reader import SCHEMA, TeacherCache, checksum
from hf_dis.cache.views import SeededViews
from hf_dis.checks import require
from hf_dis.distributed.processes import num_processes, process_index, start_processes, wait_for_everyone
from hf_dis.errors import DataError
from hf_dis.items import Items
from hf_dis.models.provenance import known_as, labels_digest, tokenizer_digest, weights_digest
from hf_dis.models.tasks import Task, base_model, find_task, num_outputs, split_labels
from hf_dis.teacher.compact import STORED_DESIGNS, TargetLayout, compact_targets
from hf_dis.teacher.loading import placed
from hf_dis.teacher.online import OnlineTeacher

LABELS = ("label", "labels", "label_ids")


# Examples whose keys are the data set's fingerprint, and of these the ones that are read twice.
PROBED, READ_TWICE = 32, 4


# What an item takes up, unless told otherwise: of a classifier, of a token.
IMAGE_BYTES, TOKEN_BYTES = 300, 60


def cache_teacher_targets(
    teacher: nn.Module,
    dataset: Sized,
    output_dir: str | Path,
    *,
    temperature: float = 2.0,
    depth: int | None = None,
    sample_size: int | None = None,
    design: str = "systematic",
    num_classes: int | None = None,
    data_collator: Callable[[Any], Mapping[str, Tensor]] = default_data_collator,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    shard_examples: int = 4096,
    seed: int = 0,
    show_progress: bool = True,
) -> TeacherCache:
    """Runs the teacher over a data set once and stores its targets; run by each process of an ``accelerate launch``.

    A shard is there in full or not at all, so a run that was stopped is run again with the same arguments and goes on
    where it was; shards that are missing or damaged are written again, the others are left as they are.

    Args:
        teacher: a transformers model for one of the tasks of :class:`hf_dis.models.tasks.Task`, or another that returns
            ``.logits`` of shape ``[B, C]``; moved to the process's device and put into evaluation mode. Load it in the
            precision that it is to run in.
        dataset: of known length and in a fixed order, not augmented at random; or :class:`hf_dis.data.SeededViews`.
        output_dir: the folder of the cache.
        temperature: τ > 0, which the student will be distilled at.
        depth: m >= 0, ranked classes of an item that are stored with their probability; at most C. If None 32, 2 where
            items are tokens, and all classes where they fit into the bytes that an item may have.
        sample_size: T >= 0, classes of an item that are sampled from the others. If None as many as fit into 300 bytes a
            item, 60 where items are tokens.
        design: ``"systematic"``, or ``"independent"``: independent samples, with ``depth=0`` the estimator of RS-KD.
        num_classes: C, the first of the teacher's classes, which it shares with the student; all of them if None.
        data_collator: makes a batch on the CPU; the Trainer will be given the same.
        processing_class: the tokenizer, by which another one is told apart.
        batch_size: examples that the teacher is given at a time.
        num_workers: processes that prepare batches, for each process that runs the teacher.
        shard_examples: examples a shard: what at most is lost by each process when it is stopped.
        seed: of the tail's samples.
        show_progress: a progress bar on the main process.

    Returns:
        the finished cache.

    Raises:
        ValueError: if an argument is out of its range.
        DataError: if the data set is empty or changes from one reading to the next, or the folder holds another cache.
        FloatingPointError: if the teacher answers NaN or Inf.
    """
    task = find_task(teacher) if hasattr(base_model(teacher), "config") else Task.CLASSIFICATION
    require(temperature > 0, "temperature", temperature, "above 0; 1 to 4 is usual")
    require(depth is None or depth >= 0, "depth", depth, "0 or more")
    enough = sample_size is None or sample_size > 0 or (sample_size == 0 and depth != 0)
    require(enough, "sample_size", sample_size, "0 or more, and 1 or more if depth=0")
    require(design in STORED_DESIGNS, "design", design, f"one of {', '.join(STORED_DESIGNS)}")
    require(batch_size >= 1, "batch_size", batch_size, "1 or more")
    require(shard_examples >= 1, "shard_examples", shard_examples, "1 or more")
    device, path = start_processes(), Path(output_dir)
    teacher = placed(teacher, device).eval()
    prepare = _Prepare(data_collator, list(inspect.signature(base_model(teacher).forward).parameters))
    inputs, fingerprint, batch = _look_at(dataset, prepare)
    num_classes = num_classes or _count_classes(teacher, task, batch, device)
    layout = _layout(task, num_classes, depth, sample_size)
    header = CacheHeader(
        num_classes=num_classes,
        temperature=temperature,
        depth=layout.depth,
        sample_size=layout.sample_size,
        design=design,
        seed=seed,
        teacher=_describe(teacher),
        labels=labels_digest(teacher),
        tokenizer=None if processing_class is None else tokenizer_digest(processing_class),
        inputs=inputs,
        dataset={"examples": len(dataset), "fingerprint": fingerprint},
        views={"number": dataset.number, "seed": dataset.seed} if isinstance(dataset, SeededViews) else None,
        shard_examples=shard_examples,
    )
    if process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        _begin(path, header)
    wait_for_everyone()
    missing = [shard for shard in range(header.num_shards) if not _note(path, shard).is_file()]
    wait_for_everyone()
    mine = missing[process_index() :: num_processes()]
    ranges = [range(shard * shard_examples, min((shard + 1) * shard_examples, len(dataset))) for shard in mine]
    batches = [list(examples[i : i + batch_size]) for examples in ranges for i in range(0, len(examples), batch_size)]
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=prepare, num_workers=num_workers))
    online = OnlineTeacher(teacher, num_classes, temperature, layout.depth)
    hidden = not (show_progress and process_index() == 0)
    with tqdm(total=sum(map(len, ranges)), unit="examples", desc="Teacher targets", disable=hidden) as bar:
        for shard, examples in zip(mine, ranges, strict=True):
            generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, shard)).generate_state(1)[0]))
            keys, counts, targets = [], [], []
            while len(keys) < len(examples):
                batch, batch_keys = next(loader)
                items, batch = split_labels(teacher, task, {name: value.to(device) for name, value in batch.items()})
                for logits in online.all_classes(batch, items):
                    compact = compact_targets(logits, temperature, layout.depth, layout.sample_size, generator, design)
                    targets.append(layout.pack(compact).cpu())
                keys += batch_keys
                counts += _items_by_example(items)
                bar.update(len(batch_keys))
            _write_shard(path, shard, keys, counts, torch.cat(targets).numpy())
    wait_for_everyone()
    if process_index() == 0:
        _finish(path, header)
    wait_for_everyone()
    return TeacherCache(path, verify=False)


def _layout(task: Task, num_classes: int, depth: int | None, sample_size: int | None) -> TargetLayout:
    num_bytes, usual_depth = (TOKEN_BYTES, 2) if task.has_token_items else (IMAGE_BYTES, 32)
    whole = TargetLayout(num_classes, num_classes, 0)
    if depth is None:
        depth = num_classes if sample_size is None and whole.item_bytes <= num_bytes else usual_depth
    if depth >= num_classes:
        return whole
    if sample_size is not None:
        return TargetLayout(num_classes, depth, sample_size)
    filled = TargetLayout.within(num_bytes, num_classes, depth)
    fits = f"a number that leaves room for a tail in {num_bytes} bytes an item, or given with sample_size"
    require(filled.sample_size > 0, "depth", depth, fits)
    return filled


class _Prepare:
    """Collates what the teacher takes, labels included, and the examples' keys; works within dataloader workers."""

    def __init__(self, collate: Callable[[Any], Mapping[str, Tensor]], parameters: list[str]):
        self.collate, self.wanted = collate, {*parameters, *LABELS}

    def __call__(self, features: Any) -> tuple[dict[str, Tensor], list[int]]:
        if isinstance(features, list):
            features = [{name: feature[name] for name in feature if name in self.wanted} for feature in features]
        batch = {name: value for name, value in self.collate(features).items() if name in self.wanted}
        return batch, content_keys(batch, key_inputs(batch))


def _look_at(dataset: Sized, prepare: _Prepare) -> tuple[list[str], str, dict[str, Tensor]]:
    """The inputs that make up a key; the fingerprint of the data set, which has to read the same twice; a batch."""
    if not len(dataset):
        raise DataError("the data set is empty: there is nothing to cache")
    probed = np.unique(np.linspace(0, len(dataset) - 1, PROBED).astype(int)).tolist()
    first, again = (
        [next(iter(DataLoader(dataset, batch_sampler=[[i]], collate_fn=prepare))) for i in examples]
        for examples in (probed, probed[:READ_TWICE])
    )
    keys = [key for _, (key,) in first]
    if [key for _, (key,) in again] != keys[: len(again)]:
        raise DataError(
            "the data set gives an example another time as something else: it augments at random, and a target "
            "belongs to one view. Cache it un-augmented, or wrap it in hf_dis.data.SeededViews, and train on the same"
        )
    batch = first[0][0]
    return key_inputs(batch), xxhash.xxh3_128(np.array(keys, np.int64)).hexdigest(), batch


@torch.no_grad()
def _count_classes(teacher: nn.Module, task: Task, batch: dict[str, Tensor], device: torch.device) -> int:
    if hasattr(base_model(teacher), "config"):
        return num_outputs(teacher, task)
    _, inputs = split_labels(teacher, task, {name: value.to(device) for name, value in batch.items()})
    return teacher(**inputs).logits.shape[-1]


def _describe(teacher: nn.Module) -> dict[str, str | None]:
    name, revision = known_as(teacher)
    return {"name": name or type(teacher).__name__, "revision": revision, "weights": weights_digest(teacher)}


def _items_by_example(items: Items) -> list[int]:
    device = None if items.positions is None else items.positions.device
    return items.sums_by_example(torch.ones(len(items), dtype=torch.long, device=device)).tolist()


def _begin(path: Path, header: CacheHeader) -> None:
    """Makes the folder ready: a header without shards, and a note beside each shard that is there in full."""
    if not (path / HEADER).exists():
        if others := sorted(file.name for file in path.glob("shard-*")):
            raise DataError(
                f"{path} holds {others[0]} but no {HEADER} that would tell of what teacher: give another "
                "output_dir, or empty the folder"
            )
        _replace(path / HEADER, header.to_json().encode())
        return
    found = CacheHeader.load(path)
    if differences := found.differences(header):
        raise DataError(
            f"{path} holds another cache: {'; '.join(differences)} (there: what is to be written). Give another "
            "output_dir, or empty the folder"
        )
    told = {shard.file: shard for shard in found.shards}
    for number in range(header.num_shards):
        note = _note(path, number)
        shard = _noted(path, number) or told.get(shard_file(number))
        if shard is not None and _is_intact(path, shard):
            _replace(note, json.dumps(dataclasses.asdict(shard)).encode())
        else:
            note.unlink(missing_ok=True)


def _noted(path: Path, number: int) -> Shard | None:
    """What the note beside a shard says; None if there is none or it is damaged: the shard is then written again."""
    try:
        shard = Shard(**json.loads(_note(path, number).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return shard if shard.file == shard_file(number) else None


def _is_intact(path: Path, shard: Shard) -> bool:
    file = path / shard.file
    return file.is_file() and file.stat().st_size == shard.num_bytes and checksum(file) == shard.xxh3_128


def _write_shard(path: Path, number: int, keys: list[int], counts: list[int], targets: np.ndarray) -> None:
    if targets.nbytes >= 2**31:
        raise DataError(f"a shard of {targets.nbytes:,} bytes is too large for Arrow (2 GiB): lower shard_examples")
    offsets = (np.cumsum([0, *counts]) * targets.shape[1]).astype(np.int32)
    column = pa.BinaryArray.from_buffers(
        pa.binary(), len(keys), [None, pa.py_buffer(offsets), pa.py_buffer(targets.tobytes())]
    )
    table = pa.table([pa.array(keys, pa.int64()), column], schema=SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    file = path / shard_file(number)
    shard = Shard(file.name, len(keys), len(targets), len(content), xxhash.xxh3_128(content).hexdigest())
    # The note first: a shard that is there in full is then never without one, and never written again.
    _replace(_note(path, number), json.dumps(dataclasses.asdict(shard)).encode())
    _replace(file, content)


def _finish(path: Path, header: CacheHeader) -> None:
    notes = [_note(path, number) for number in range(header.num_shards)]
    shards = [Shard(**json.loads(note.read_text())) for note in notes]
    complete = dataclasses.replace(header, shards=shards)
    _replace(path / "README.md", complete.card().encode())
    _replace(path / HEADER, complete.to_json().encode())
    for note in notes:
        note.unlink()


def _note(path: Path, number: int) -> Path:
    return (path / shard_file(number)).with_suffix(".json")


def _replace(path: Path, content: bytes | pa.Buffer) -> None:
    """Writes a file that is there in full or not at all, whenever the process or the machine is stopped."""
    partial = path.with_suffix(f"{path.suffix}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
