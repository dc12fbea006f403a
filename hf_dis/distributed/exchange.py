"""Exchanges between processes that hold the classes of a teacher's output head: of features, and of answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.head.vocab_shard import VocabShard


class SameItems:
    """The exchange between processes that have the same items.

    Args:
        shard: the classes of this process.
        sizes: the number of classes of each process.
    """

    def __init__(self, shard: VocabShard, sizes: Sequence[int]):
        self.shard, self.sizes = shard, list(sizes)

    def everyones(self, values: Tensor) -> Tensor:
        """The values of all items that the shards answer about, for those of this process, ``[n, ...]``."""
        return values

    def own(self, values: Tensor) -> Tensor:
        """The values of the items of this process."""
        return values

    def by_shard(self, values: Tensor) -> Tensor:
        """The values that each shard has for the items of this process, ``[P, n, k]``."""
        return self.shard.gather(values)

    def joined(self, values: Tensor) -> Tensor:
        """The sums over the shards for the items of this process, ``[n, k]``."""
        return self.shard.sum(values)

    def side_by_side(self, logits: Tensor) -> Tensor:
        """The logits of all classes for the items of this process, ``[n, C]``."""
        filled = F.pad(logits, (0, max(self.sizes) - logits.shape[1]))
        return torch.cat([part[:, :size] for part, size in zip(self.shard.gather(filled), self.sizes, strict=True)], 1)

    def of_all_classes(self, mass: Tensor) -> Tensor:
        """A sum over the items for each class, ``[C]``, for those of the own classes; zero at all other classes."""
        return F.pad(mass, (self.shard.start, sum(self.sizes) - self.shard.start - len(mass)))


class OwnItems(SameItems):
    """The exchange between processes that have items of their own.

    Args:
        shard, sizes: as for :class:`SameItems`.
        numbers: the number of items of each process.
        most: the items to which each process is filled up.
    """

    def __init__(self, shard: VocabShard, sizes: Sequence[int], numbers: Sequence[int], most: int):
        super().__init__(shard, sizes)
        self.numbers, self.most = numbers, most

    def everyones(self, values: Tensor) -> Tensor:
        """As :meth:`SameItems.everyones`."""
        filled = F.pad(values, (0, 0) * (values.dim() - 1) + (0, self.most - len(values)))
        return self.shard.gather(filled).flatten(0, 1)

    def own(self, values: Tensor) -> Tensor:
        """As :meth:`SameItems.own`."""
        first = self.shard.index * self.most
        return values[first : first + self.numbers[self.shard.index]]

    def by_shard(self, values: Tensor) -> Tensor:
        """As :meth:`SameItems.by_shard`."""
        if self.shard.number > 1:
            values = self.shard.exchange(values.flatten()).view(values.shape)
        return values.unflatten(0, (self.shard.number, self.most))[:, : self.numbers[self.shard.index]]

    def joined(self, values: Tensor) -> Tensor:
        """As :meth:`SameItems.joined`."""
        parts = values.unflatten(0, (self.shard.number, self.most))
        return self.shard.sum_of_parts(parts)[: self.numbers[self.shard.index]]

    def side_by_side(self, logits: Tensor) -> Tensor:
        """As :meth:`SameItems.side_by_side`."""
        parts = logits.unflatten(0, (self.shard.number, self.most))
        return self.shard.side_by_side(parts, self.sizes)[: self.numbers[self.shard.index]]

    @cached_property
    def is_item(self) -> Tensor:
        """True where an item of all processes is not a filler, ``[P · n]``."""
        return (torch.arange(self.most) < torch.tensor(self.numbers)[:, None]).flatten()
