"""Training on a cache of teacher targets: opening it, and the checks that it fits the student and the dataset."""

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

# Examples of a training set that are looked up before the training.
PROBED = 16


def open_cache(cache: TeacherCache | str | Path | None) -> TeacherCache | None:
    """Opens the cache in a folder; returns an open cache, or None, as it is.

    One process of each machine compares all shards with their checksums.

    Raises:
        DataError: as :class:`hf_dis.TeacherCache`.
    """
    is_path = isinstance(cache, (str, Path))
    return TeacherCache(cache, verify=is_first_of_machine()) if is_path else cache


def cached_teacher(cache: TeacherCache) -> CachedTeacher:
    """Makes the teacher that answers from a cache; its fingerprint is that of the teacher's weights."""
    return CachedTeacher(cache.header.layout, cache.header.teacher["weights"][:16])


def check_data(loader: DataLoader, seed: int) -> None:
    """Looks up some examples of a dataset, spread over all of it, before the training; a stream is not looked at.

    Args:
        loader: of the training or the evaluation, which collates with a cache.
        seed: of the training; the global generators are left as they were.

    Raises:
        DataError: if an example is not in the cache.
    """
    if isinstance(loader.dataset, IterableDataset):
        return
    spread = np.unique(np.linspace(0, len(loader.dataset) - 1, PROBED).astype(int)).tolist()
    with seeded((seed,)):
        next(iter(DataLoader(loader.dataset, batch_sampler=[spread], collate_fn=loader.collate_fn)))


def check_cache(
    cache: TeacherCache,
    student: nn.Module,
    num_outputs: int,
    is_lm: bool,
    temperature: float,
    tokenizer: PreTrainedTokenizerBase | None,
) -> int:
    """Checks that a cache was made for this student, and returns C, the number of its classes.

    Args:
        cache: to be trained on or evaluated with.
        student: the model.
        num_outputs: classes that the student has logits of.
        is_lm: the classes are a vocabulary, which the student may pad beyond the classes of the cache.
        temperature: τ of the training.
        tokenizer: of the student, if known.

    Raises:
        ValueError: names every difference between cache and training.
    """
    header, wrong = cache.header, []
    if num_outputs < header.num_classes or (num_outputs > header.num_classes and not is_lm):
        wrong.append(f"num_classes: the cache has {header.num_classes}, the student {num_outputs}")
    if header.temperature != temperature:
        wrong.append(f"temperature: the cache has {header.temperature:g}, the training {temperature:g}")
    labels = labels_digest(student)
    if None not in (header.labels, labels) and header.labels != labels:
        wrong.append("label names: id2label of the student's configuration differs from the teacher's")
    if None not in (header.tokenizer, tokenizer) and header.tokenizer != tokenizer_digest(tokenizer):
        wrong.append("tokenizer: its vocabulary differs from that of the cache's tokenizer")
    if wrong:
        raise ValueError(
            f"the teacher cache {cache.path} does not fit. {'; '.join(wrong)}. Train with the settings of the cache, "
            "or write another cache with cache_teacher_targets"
        )
    return header.num_classes
