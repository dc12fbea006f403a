"""Writing a cache of teacher targets: shard by shard, by any number of processes, from where a run stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, default_data_collator
from transformers.utils.logging import tqdm

from hf_dis.cache.examples import Batch, Collate, Examples
from hf_dis.cache.folder import CacheFolder
from hf_dis.cache.header import CacheHeader
from hf_dis.cache.reader import TeacherCache
from hf_dis.cache.views import SeededViews
from hf_dis.checks import require
from hf_dis.distributed.processes import joined_processes, num_processes, process_index, wait_for_everyone
from hf_dis.items import Items
from hf_dis.models.provenance import (
    class_name,
    known_as,
    known_license,
    labels_digest,
    tokenizer_digest,
    weights_digest,
)
from hf_dis.models.spread import is_fully_sharded, is_true_anywhere
from hf_dis.models.tasks import Task, base_model, find_task, num_outputs, split_labels
from hf_dis.sharded_teacher import ShardedTeacher, is_spread, whole_digest
from hf_dis.teacher.compact import STORED_DESIGNS, TargetLayout, compact_targets
from hf_dis.teacher.loading import placed
from hf_dis.teacher.online import OnlineTeacher

# Bytes of an item and its ranked classes where no size is given: of an example, of a token.
EXAMPLE_BYTES, TOKEN_BYTES = 300, 60
EXAMPLE_DEPTH, TOKEN_DEPTH = 32, 2


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
    data_collator: Callable[[Any], Mapping[str, Any]] = default_data_collator,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    shard_examples: int = 4096,
    seed: int = 0,
    show_progress: bool = True,
) -> TeacherCache:
    """Runs the teacher over a dataset once and stores its targets; every process of a launcher calls it.

    A run that was stopped continues when it is started again with the same arguments. See docs/cache.md.

    Args:
        teacher: returns ``.logits``, ``[B, C]``; a transformers model of any :class:`hf_dis.models.tasks.Task` may
            return ``[B, S, C]``. Its head may be spread over the processes, or FSDP2 may shard the teacher. It is
            moved to the device of the process and put into evaluation mode.
        dataset: with a length, a fixed order and no random augmentation; or :class:`hf_dis.cache.SeededViews`.
        output_dir: the folder of the cache.
        temperature: τ > 0, of the distillation.
        depth: m, ranked classes of an item, from 0 to C. None: 32, or 2 for tokens, or C if all classes fit.
        sample_size: T >= 0, sampled classes of an item. None: as many as fit into 300 bytes, or 60 for tokens.
        design: ``"systematic"`` or ``"independent"``; independent samples with ``depth=0`` are RS-KD.
        num_classes: C, the first of the teacher's classes, which the student shares; None: all.
        data_collator: makes a batch on the CPU; give the training the same one.
        processing_class: the tokenizer, by which another tokenizer is recognised.
        batch_size: examples per forward of the teacher.
        num_workers: processes that prepare batches, per process of the run.
        shard_examples: examples per shard; a process that is stopped loses at most one shard.
        seed: of the samples.
        show_progress: show a progress bar on the first process, unless transformers' progress bars are disabled.

    Raises:
        ValueError: if an argument is out of its range.
        DataError: if the dataset is empty or changes between readings, or the folder holds another cache.
        FloatingPointError: if the teacher's logits hold NaN or Inf.
    """
    require(batch_size >= 1, "batch_size", batch_size, "1 or more")
    settings = _Settings(temperature, depth, sample_size, design, num_classes, shard_examples, seed)
    with joined_processes() as device:
        teacher = placed(teacher, device).eval()
        examples = Examples(dataset, Collate(data_collator, teacher), batch_size, num_workers)
        header = _header(settings, teacher, examples, processing_class, device)
        _write(CacheFolder(Path(output_dir), header), teacher, examples, device, show_progress)
    return TeacherCache(output_dir, verify=False)


@dataclass(frozen=True)
class _Settings:
    """Arguments of :func:`cache_teacher_targets` that a header records, checked."""

    temperature: float
    depth: int | None
    sample_size: int | None
    design: str
    num_classes: int | None
    shard_examples: int
    seed: int

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0; 1 to 4 is usual")
        require(self.depth is None or self.depth >= 0, "depth", self.depth, "0 or more")
        is_enough = self.sample_size is None or self.sample_size > 0 or (self.sample_size == 0 and self.depth != 0)
        require(is_enough, "sample_size", self.sample_size, "0 or more, and 1 or more if depth=0")
        require(self.design in STORED_DESIGNS, "design", self.design, f"one of {', '.join(STORED_DESIGNS)}")
        require(self.shard_examples >= 1, "shard_examples", self.shard_examples, "1 or more")

    def layout(self, task: Task, num_classes: int) -> TargetLayout:
        """Chooses depth and sample size where they are not given, by the bytes that an item may take."""
        is_token = task.has_token_items
        num_bytes, depth = (TOKEN_BYTES, TOKEN_DEPTH) if is_token else (EXAMPLE_BYTES, EXAMPLE_DEPTH)
        all_classes = TargetLayout(num_classes, num_classes, 0)
        if self.depth is not None:
            depth = self.depth
        elif self.sample_size is None and all_classes.item_bytes <= num_bytes:
            return all_classes
        if depth >= num_classes:
            return all_classes
        if self.sample_size is not None:
            return TargetLayout(num_classes, depth, self.sample_size)
        filled = TargetLayout.within(num_bytes, num_classes, depth)
        expected = f"a number that leaves room for samples in {num_bytes} bytes per item, or given with sample_size"
        require(filled.sample_size > 0, "depth", depth, expected)
        return filled


def _header(
    settings: _Settings,
    teacher: nn.Module,
    examples: Examples,
    processing_class: PreTrainedTokenizerBase | None,
    device: torch.device,
) -> CacheHeader:
    """Makes the header of a cache, without shards."""
    first, fingerprint = examples.probe()
    task, dataset = _task(teacher), examples.dataset
    layout = settings.layout(task, settings.num_classes or _count_classes(teacher, task, first.to(device)))
    name, revision = known_as(teacher)
    digest = whole_digest(teacher) if is_spread(teacher) else weights_digest(teacher)
    return CacheHeader(
        num_classes=layout.num_classes,
        temperature=settings.temperature,
        depth=layout.depth,
        sample_size=layout.sample_size,
        design=settings.design,
        seed=settings.seed,
        teacher={"name": name or class_name(teacher), "revision": revision, "weights": digest},
        labels=labels_digest(teacher),
        tokenizer=None if processing_class is None else tokenizer_digest(processing_class),
        inputs=first.key_inputs,
        dataset={"examples": len(dataset), "fingerprint": fingerprint},
        views={"number": dataset.number, "seed": dataset.seed} if isinstance(dataset, SeededViews) else None,
        shard_examples=settings.shard_examples,
    )


def _task(teacher: nn.Module) -> Task:
    return find_task(teacher) if hasattr(base_model(teacher), "config") else Task.CLASSIFICATION


@torch.no_grad()
def _count_classes(teacher: nn.Module, task: Task, batch: dict[str, Any]) -> int:
    if hasattr(base_model(teacher), "config"):
        return num_outputs(teacher, task)
    return teacher(**split_labels(teacher, task, batch)[1]).logits.shape[-1]


def _write(
    folder: CacheFolder, teacher: nn.Module, examples: Examples, device: torch.device, show_progress: bool
) -> None:
    """Writes the shards that are missing, each by one of the processes, and completes the folder.

    Where the classes of the teacher are spread over the processes, all of them compute each shard together, and the
    first one writes. Where FSDP2 shards the teacher, processes that are done run it beside those that are not.
    """
    is_first, together = process_index() == 0, is_spread(teacher)
    if is_first:
        folder.begin(show_progress)
    wait_for_everyone()
    missing = folder.missing()
    wait_for_everyone()  # no process writes before all of them have divided the same shards
    mine = missing if together else missing[process_index() :: num_processes()]
    ranges = [folder.header.examples_of(shard) for shard in mine]
    batches = examples.read([part for indices in ranges for part in examples.split(indices)])
    source = _TargetSource(teacher, folder.header, device)
    hidden = not (show_progress and is_first)
    with tqdm(total=sum(map(len, ranges)), unit=" examples", desc="Teacher targets", disable=hidden) as bar:
        written = _Written(bar, folder.header.layout.item_bytes)
        for shard, indices in zip(mine, ranges, strict=True):
            targets = source.of_shard(shard, len(indices), batches, written)
            if is_first or not together:
                folder.write(shard, *targets)
        source.accompany(examples)
    wait_for_everyone()
    if is_first:
        folder.finish(known_license(teacher))
    wait_for_everyone()


class _Written:
    """Counts examples, items and bytes of one process on its progress bar.

    Args:
        bar: of tqdm; it shows the remaining time.
        item_bytes: size of an item.
    """

    def __init__(self, bar: Any, item_bytes: int):
        self.bar, self.item_bytes, self.items = bar, item_bytes, 0

    def __call__(self, examples: int, items: int) -> None:
        """Adds the examples and items of a batch."""
        self.items += items
        self.bar.set_postfix_str(f"{self.items:,} items, {self.items * self.item_bytes / 1e6:,.1f} MB", refresh=False)
        self.bar.update(examples)


class _TargetSource:
    """Computes the targets of a shard as they are stored.

    Args:
        teacher: on its device.
        header: of the cache.
        device: of the process.
    """

    def __init__(self, teacher: nn.Module, header: CacheHeader, device: torch.device):
        self.teacher, self.header, self.device, self.task = teacher, header, device, _task(teacher)
        given = teacher, header.num_classes, header.temperature, header.depth
        together = is_spread(teacher)  # all processes have the same batches
        self.online = ShardedTeacher(*given, has_same_items=True) if together else OnlineTeacher(*given)
        self._is_accompanied = is_fully_sharded(teacher) and not together

    def of_shard(
        self, shard: int, num_examples: int, batches: Iterator[Batch], report: Callable[[int, int], Any]
    ) -> tuple[list[int], list[int], np.ndarray]:
        """Computes keys, numbers of items and targets of a shard's examples.

        Args:
            shard: its number, by which the samples are seeded.
            num_examples: in the shard.
            batches: of this shard and of later ones.
            report: is called with the numbers of examples and items of each batch that is done.

        Returns:
            a key per example, the number of items of each example, and the items, uint8 ``[items, item_bytes]``.
        """
        seed = np.random.SeedSequence((self.header.seed, shard)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        keys, counts, targets = [], [], []
        while len(keys) < num_examples:
            batch = next(batches)
            if self._is_accompanied:
                is_true_anywhere(True, self.teacher)  # processes that are done run it too
            items, inputs = self._split(batch)
            for logits in self.online.all_classes(inputs, items):
                targets.append(self._packed(logits, generator))
            keys += batch.keys
            counts += _items_by_example(items)
            report(len(batch.keys), len(items))
        return keys, counts, torch.cat(targets).numpy()

    def accompany(self, examples: Examples) -> None:
        """Runs a teacher that FSDP2 shards as long as another process has a batch; any other teacher does not run."""
        if not self._is_accompanied:
            return
        items, inputs = self._split(next(examples.read([[0]])))
        while is_true_anywhere(False, self.teacher):
            for _ in self.online.all_classes(inputs, items):
                pass

    def _split(self, batch: Batch) -> tuple[Items, dict[str, Any]]:
        return split_labels(self.teacher, self.task, batch.to(self.device))

    def _packed(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        header, layout = self.header, self.header.layout
        settings = (header.temperature, layout.depth, layout.sample_size, generator, header.design)
        return layout.pack(compact_targets(logits, *settings)).cpu()


def _items_by_example(items: Items) -> list[int]:
    device = None if items.positions is None else items.positions.device
    return items.sums_by_example(torch.ones(len(items), dtype=torch.long, device=device)).tolist()
