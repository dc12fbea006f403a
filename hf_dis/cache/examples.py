"""The examples of a dataset as a teacher is given them, batch by batch, with their keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_dis.cache.keys import PACKING, content_keys, is_joined, key_inputs
from hf_dis.errors import DataError
from hf_dis.models.columns import forward_columns, takes_any
from hf_dis.models.tasks import base_model

LABELS = ("label", "labels", "label_ids")
# Columns that TRL's collators read, and that no forward names.
COLLATED = ("seq_lengths",)
# Examples whose keys make up the fingerprint of a dataset, and the number of them that are read twice.
PROBED, READ_TWICE = 32, 4


class Batch(NamedTuple):
    """Some examples.

    Attributes:
        inputs: columns for the teacher, labels included; tensors are ``[B, ...]`` and on the CPU.
        keys: of the examples.
        key_inputs: names of the inputs that make up the keys.
    """

    inputs: dict[str, Any]
    keys: list[int]
    key_inputs: list[str]

    def to(self, device: torch.device) -> dict[str, Any]:
        """The columns for the teacher on a device."""
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}


class Collate:
    """Collates examples, keeps the columns for the teacher, and computes the keys; works within dataloader workers.

    Args:
        collate: makes a batch on the CPU.
        teacher: gets the columns that its forward takes. A transformers model whose forward accepts any keyword also
            gets the columns that separate packed sequences.
    """

    def __init__(self, collate: Callable[[Any], Mapping[str, Any]], teacher: nn.Module):
        parameters = inspect.signature(base_model(teacher).forward).parameters.values()
        is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        packing = ("position_ids", *PACKING) if is_open else ()
        self.collate, self.takes_all = collate, takes_any(teacher)
        self.columns = forward_columns(teacher).union(LABELS, packing)

    def __call__(self, features: Any) -> list[Batch]:
        """Makes one batch of the examples, or one of each example if the collator joins them (padding-free)."""
        if not isinstance(features, list):
            return [self._collated(features)]
        if not self.takes_all:
            wanted = self.columns.union(COLLATED)
            features = [{name: feature[name] for name in feature if name in wanted} for feature in features]
        batch = self._collated(features)
        if is_joined(batch.inputs, batch.key_inputs, len(features)):
            return [self._collated([feature]) for feature in features]
        if len(batch.keys) != len(features):
            raise DataError(
                f"the data_collator made {len(batch.keys)} examples of {len(features)}: a cache needs one that keeps "
                "every example"
            )
        return [batch]

    def _collated(self, features: Any) -> Batch:
        collated = self.collate(features)
        inputs = {name: value for name, value in collated.items() if self.takes_all or name in self.columns}
        # Positions separate packed sequences, also for a teacher that does not take them.
        names = key_inputs({name: value for name, value in collated.items() if name in {*inputs, "position_ids"}})
        return Batch(inputs, content_keys(collated, names), names)


class Examples:
    """A dataset that is read in a fixed order.

    Args:
        dataset: of known length.
        collate: makes the batches.
        batch_size: examples per batch.
        num_workers: processes that prepare batches; 0: none.
    """

    def __init__(self, dataset: Sized, collate: Collate, batch_size: int, num_workers: int):
        self.dataset, self.collate, self.batch_size, self.num_workers = dataset, collate, batch_size, num_workers

    def split(self, indices: range) -> list[list[int]]:
        """Splits indices of examples into batches."""
        starts = range(0, len(indices), self.batch_size)
        return [list(indices[start : start + self.batch_size]) for start in starts]

    def read(self, batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yields batches of the examples with these indices, in order."""
        return self._read(batches, self.num_workers)

    def _read(self, batches: Sequence[Sequence[int]], num_workers: int) -> Iterator[Batch]:
        loader = DataLoader(self.dataset, batch_sampler=batches, collate_fn=self.collate, num_workers=num_workers)
        return chain.from_iterable(loader)

    def probe(self) -> tuple[Batch, str]:
        """Reads some examples one by one, spread over the dataset, and a few of them twice.

        Returns:
            the first example, and the fingerprint of the dataset.

        Raises:
            DataError: if the dataset is empty, or an example differs when it is read again.
        """
        if not len(self.dataset):
            raise DataError("the dataset is empty: there is nothing to cache")
        probed = np.unique(np.linspace(0, len(self.dataset) - 1, PROBED).astype(int)).tolist()
        first = list(self._read([[index] for index in probed], num_workers=0))
        again = list(self._read([[index] for index in probed[:READ_TWICE]], num_workers=0))
        keys = [batch.keys for batch in first]
        if [batch.keys for batch in again] != keys[: len(again)]:
            raise DataError(
                "the dataset augments at random: an example has other content when it is read again, and a target "
                "belongs to one view. Cache the dataset un-augmented, or wrap it in hf_dis.cache.SeededViews, and "
                "train on the same dataset"
            )
        return first[0], xxhash.xxh3_128(np.array(keys, np.int64)).hexdigest()
