"""VocabShard: the classes of an output head that one process of a group holds, and the exchange of their logits.

Two layouts. In *tensor parallelism* all processes of the group have the same items: features are copied to the
processes, and logits are joined. In *data parallelism* (arXiv 2010.05222) each process has items of its own: features
are gathered, and the logits of an item go to the process of the item. Every exchange has its gradient. All processes
of the group have to take part in every exchange, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class VocabShard:
    """The classes that this process holds, and the processes that hold all classes together.

    Args:
        start: the first class.
        stop: the class after the last one.
        group: the processes that hold the shards; None: all processes of the run.

    Raises:
        ValueError: if there is no class, or the first class is negative.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(
                f"a shard holds the classes from {self.start} up to {self.stop}: it needs a class, the first "
                "0 or more; use fewer processes than there are classes"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __deepcopy__(self, memo: dict[int, Any]) -> VocabShard:
        return self  # a process group cannot be copied

    @property
    def number(self) -> int:
        """The number of shards, one on each process of the group."""
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def index(self) -> int:
        """The number of this shard, from 0 on."""
        return dist.get_rank(self.group) if self.number > 1 else 0

    @property
    def rows_each(self) -> int:
        """The number of classes of each process but the last ones, where shards are those of tensor parallelism."""
        return self.start // self.index if self.index else len(self)

    def copied(self, values: Tensor) -> Tensor:
        """Returns values that all processes have; their gradient is summed over the processes."""
        return values if self.number == 1 else _Exchanged.apply(values, _unchanged, self.sum)

    def joined(self, values: Tensor) -> Tensor:
        """Sums values over the processes; all processes continue with the sum, and have its gradient."""
        return values if self.number == 1 else _Exchanged.apply(values, self.sum, _unchanged)

    def gathered(self, values: Tensor) -> Tensor:
        """Gathers the values of all processes, ``[P, n, ...]`` for ``[n, ...]``; their gradient is a sum."""
        return values[None] if self.number == 1 else _Exchanged.apply(values, self.gather, self.sum_of_parts)

    def of_items(self, values: Tensor) -> Tensor:
        """Sums, for the items of this process, the values that all processes have for them.

        Args:
            values: for the items of each process, ``[P, n, ...]``.

        Returns:
            ``[n, ...]``.
        """
        return values[0] if self.number == 1 else _Exchanged.apply(values, self.sum_of_parts, self.gather)

    def side_by_side(self, values: Tensor, sizes: list[int]) -> Tensor:
        """Puts the columns of all processes side by side, for the items of this process.

        Args:
            values: the columns of this process, for the items of each process, ``[P, n, c]``.
            sizes: the number of columns of each process.

        Returns:
            ``[n, Σ sizes]``.
        """
        if self.number == 1:
            return values[0]
        return _Exchanged.apply(values, partial(self._all_columns, sizes=sizes), partial(self.by_shard, sizes=sizes))

    def _all_columns(self, values: Tensor, sizes: list[int]) -> Tensor:
        """The inverse of :meth:`by_shard`: ``[n, Σ sizes]`` for ``[P, n, c]``, without gradient."""
        num_items = values.shape[1]
        found = self.exchange(values.flatten(), None, [num_items * size for size in sizes])
        parts = found.split([num_items * size for size in sizes])
        return torch.cat([part.view(num_items, size) for part, size in zip(parts, sizes, strict=True)], 1)

    def by_shard(self, values: Tensor, sizes: list[int]) -> Tensor:
        """Sends the columns of all classes to the processes that hold them, without gradient.

        Args:
            values: of all classes, for the items of this process, ``[n, Σ sizes]``; n is the same on all processes.
            sizes: the number of classes of each process.

        Returns:
            the columns of this process, for the items of each process, ``[P, n, c]``.
        """
        if self.number == 1:
            return values[None]
        num_items, own = len(values), sizes[self.index]
        parts = torch.cat([part.flatten() for part in values.split(sizes, 1)])
        found = self.exchange(parts, [num_items * size for size in sizes], [num_items * own] * self.number)
        return found.view(self.number, num_items, own)

    def sum(self, values: Tensor) -> Tensor:
        """Sums values over the processes, in float32 or wider, without gradient."""
        total = values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True).contiguous()
        if self.number > 1:
            dist.all_reduce(total, group=self.group)
        return total.to(values.dtype)

    def gather(self, values: Tensor) -> Tensor:
        """Gathers values of one shape, ``[P, ...]`` for ``[...]``, without gradient."""
        values = values.detach().contiguous()
        if self.number == 1:
            return values[None]
        gathered = values.new_empty(self.number * values.numel())
        dist.all_gather_into_tensor(gathered, values.flatten(), group=self.group)
        return gathered.view(self.number, *values.shape)

    def exchange(self, values: Tensor, sent: list[int] | None = None, received: list[int] | None = None) -> Tensor:
        """Sends parts of a vector to the processes, and joins the parts that they send; without gradient.

        Args:
            values: the parts one after another, ``[n]``.
            sent, received: the sizes of the parts; None: all are equal.
        """
        total = len(values) if received is None else sum(received)
        found = values.new_empty(total)
        dist.all_to_all_single(found, values.contiguous(), received, sent, group=self.group)
        return found

    def sum_of_parts(self, values: Tensor) -> Tensor:
        """Sums the parts ``[n, ...]`` that the processes have for this one, of ``[P, n, ...]``; without gradient.

        The order of the sum is that of the processes, in float32 or wider.
        """
        if self.number == 1:
            return values[0]
        parts = self.exchange(values.detach().flatten()).view(values.shape)
        wide = torch.promote_types(values.dtype, torch.float32)
        return parts.sum(0, dtype=wide).to(values.dtype)


def check_shards(shard: VocabShard, weight: Tensor, num_classes: int) -> None:
    """Checks that the shards of a group hold every class once; the processes have to call this together.

    Args:
        shard: of this process.
        weight: its rows, ``[S, d]``.
        num_classes: C.

    Raises:
        ValueError: if a class is held by no process, or by several; or if the shard has other rows than it says.
    """
    if len(weight) != len(shard):
        raise ValueError(
            f"the weight has {len(weight)} rows, and the shard holds {len(shard)} classes, from {shard.start} up to "
            f"{shard.stop}: pass the rows of these classes"
        )
    bounds = shard.gather(torch.tensor([shard.start, shard.stop], device=weight.device)).tolist()
    if [start for start, _ in sorted(bounds)] + [num_classes] != [0, *(stop for _, stop in sorted(bounds))]:
        raise ValueError(
            f"the shards of the group hold the classes {bounds}, and there are {num_classes}: every class has to "
            "be held once; give each process a VocabShard of its own"
        )


class _Exchanged(torch.autograd.Function):
    """An exchange of values ``there``, and the exchange of their gradient ``back``."""

    @staticmethod
    def forward(ctx, values, there, back):
        ctx.back = back
        return there(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.back(grad), None, None


def _unchanged(values: Tensor) -> Tensor:
    return values.view_as(values)
