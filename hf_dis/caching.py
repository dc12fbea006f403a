"""Training on a cache of teacher targets: the checks that it is the right one, and its targets in the batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer

from .cached_teacher import CachedTargets
from .compact import CompactTargets
from .data.cache_header import CacheHeader
from .data.errors import DataError
from .data.provenance import labels_digest, tokenizer_digest
from .data.teacher_cache import TeacherCache
from .data.views import seeded
from .rows import Rows

# Examples of a training set that are looked up before it is trained on.
PROBED = 16


class CachedTeacher:
    """Answers from what a cache put into the batch; stands where :class:`hf_dis.teachers.OnlineTeacher` does.

    Args:
        cache: whose :meth:`TeacherCache.collator` makes the batches.
    """

    def __init__(self, cache: TeacherCache):
        self.header = cache.header

    @property
    def fingerprint(self) -> str:
        """Of the teacher that the cache was written with: another teacher has another one."""
        return self.header.teacher["weights"][:16]

    def __call__(self, inputs: Any, rows: Rows, check_finite: bool = True) -> Iterator[CachedTargets]:
        """Yields the targets of all rows.

        Raises:
            DataError: if the batch has not come with targets, with those of other rows, or with what no teacher says.
        """
        if rows.targets is None:
            raise DataError(
                "the batch holds no stored targets: collate it with TeacherCache.collator(your_collator), as the "
                "trainer's own dataloader does"
            )
        check_targets(rows)
        yield CachedTargets(unpack_targets(self.header, rows.targets, check_finite), self.header.num_classes)


def check_targets(rows: Rows) -> None:
    """Raises DataError if a cache's targets are not those of as many rows as the batch has."""
    if len(rows.targets) != len(rows):
        raise DataError(
            f"the cache holds targets of {len(rows.targets)} rows for this batch, and {len(rows)} are supervised: "
            "mask the labels as when the cache was written"
        )


def unpack_targets(header: CacheHeader, packed: Tensor, check_values: bool) -> CompactTargets:
    """The targets of stored rows, uint8 ``[n, row_bytes]``, on their device.

    Args:
        header: of their cache.
        packed: the rows.
        check_values: whether to look at them; on an accelerator this waits for the device.

    Raises:
        DataError: if they name classes that there are not, or their probabilities do not sum to one, as far as half
            precision tells.
    """
    targets = header.layout.unpack(packed)
    if check_values:
        mass = targets.log_probs.exp().sum(1) + targets.log_tail_mass.exp()
        is_known = torch.cat([targets.ids, targets.tail_ids], 1).lt(header.num_classes).all(1)
        sound = is_known & ((mass - 1).abs() < 0.1) & (targets.entropy + targets.log_normaliser).isfinite()
        if not sound.all():
            raise DataError(
                f"{int((~sound).sum())} of {len(sound)} stored rows are no answer about {header.num_classes} classes: "
                "the cache was not written by hf_dis, or was altered since; write it again"
            )
    return targets


class CacheMixin(Trainer):
    """How a distilling trainer gets at the targets that are stored of its data."""

    teacher_cache: TeacherCache | None
    eval_teacher_cache: TeacherCache | None

    def _get_dataloader(self, dataset: Dataset, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        cache = {"Training": self.teacher_cache, "Evaluation": self.eval_teacher_cache}.get(description)
        if cache is None:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        collator = self.data_collator
        self.data_collator = cache.collator(collator)
        try:
            loader = super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collator
        if not isinstance(loader.dataset, IterableDataset):
            # A data set that is another one in part should be told before it is trained on, not in the midst.
            spread = np.unique(np.linspace(0, len(loader.dataset) - 1, PROBED).astype(int)).tolist()
            with seeded((self.args.seed,)):  # a run from a cache shuffles as one without
                next(iter(DataLoader(loader.dataset, batch_sampler=[spread], collate_fn=loader.collate_fn)))
        return loader


def open_cache(cache: TeacherCache | str | Path | None) -> TeacherCache | None:
    """The cache in a folder; one that is open already, or None, as it is. One process of a machine reads all shards to
    check them."""
    is_path = isinstance(cache, (str, Path))
    return TeacherCache(cache, verify=PartialState().is_local_main_process) if is_path else cache


def check_cache(
    cache: TeacherCache,
    student: nn.Module,
    num_outputs: int,
    is_lm: bool,
    temperature: float,
    tokenizer: PreTrainedTokenizerBase | None,
) -> int:
    """C, after checking that a cache was made for this student.

    Args:
        cache: to be trained on or evaluated with.
        student: the model.
        num_outputs: classes that it answers for.
        is_lm: whether these are a vocabulary, which may be padded beyond the classes of the cache.
        temperature: τ of the training.
        tokenizer: the student's, if known.

    Raises:
        ValueError: says everything in which they differ.
    """
    header, wrong = cache.header, []
    if num_outputs < header.num_classes or (num_outputs > header.num_classes and not is_lm):
        wrong.append(f"num_classes: the cache has {header.num_classes}, the student {num_outputs}")
    if header.temperature != temperature:
        wrong.append(f"temperature: the cache has {header.temperature:g}, the training {temperature:g}")
    labels = labels_digest(student)
    if None not in (header.labels, labels) and header.labels != labels:
        wrong.append("label names: id2label of the student's configuration is not that of the teacher's")
    if None not in (header.tokenizer, tokenizer) and header.tokenizer != tokenizer_digest(tokenizer):
        wrong.append("tokenizer: its vocabulary is not the one that the cache was made with")
    if wrong:
        raise ValueError(
            f"the teacher cache {cache.path} does not fit. {'; '.join(wrong)}. Train with what it was made with, or "
            "write another with cache_teacher_targets"
        )
    return header.num_classes
