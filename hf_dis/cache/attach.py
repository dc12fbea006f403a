"""Training on a cache of teacher targets: the checks that it is the right one, and its targets in the batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_dis.cache.reader import TeacherCache
from hf_dis.cache.views import seeded
from hf_dis.distributed.processes import is_first_of_machine
from hf_dis.models.provenance import labels_digest, tokenizer_digest
from hf_dis.teacher.cached import CachedTeacher

# Examples of a training set that are looked up before it is trained on.
PROBED = 16


def cached_teacher(cache: TeacherCache) -> CachedTeacher:
    """The teacher of a cache; another teacher has another fingerprint."""
    return CachedTeacher(cache.header.layout, cache.header.teacher["weights"][:16])


def check_data(loader: DataLoader, seed: int) -> None:
    """Looks up some examples of a training set before it is trained on, spread over all of it.

    Args:
        loader: of the training, which collates with a cache.
        seed: of the training: a run from a cache shuffles as a run without.

    Raises:
        DataError: if an example is not in the cache.
    """
    if not isinstance(loader.dataset, IterableDataset):
        spread = np.unique(np.linspace(0, len(loader.dataset) - 1, PROBED).astype(int)).tolist()
        with seeded((seed,)):
            next(iter(DataLoader(loader.dataset, batch_sampler=[spread], collate_fn=loader.collate_fn)))


def open_cache(cache: TeacherCache | str | Path | None) -> TeacherCache | None:
    """The cache in a folder; one that is open already, or None, as it is. One process of a machine reads all shards to
    check them."""
    is_path = isinstance(cache, (str, Path))
    return TeacherCache(cache, verify=is_first_of_machine()) if is_path else cache


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
