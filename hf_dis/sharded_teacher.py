"""Teachers whose output head is spread over the processes: each shard ranks its own classes, and the ranks are merged.

In tensor parallelism all processes have the same items. With a :class:`hf_dis.ShardedHead` each process has items of
its own: their features go to all shards, and the answers come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_dis.distributed.exchange import OwnItems, SameItems
from hf_dis.distributed.shard_targets import PRECISION, ShardedAnswers, ShardTargets, parts
from hf_dis.head.sharded import ShardedHead, sharded_heads
from hf_dis.head.tensor_parallel import OwnRows, is_tensor_parallel, own_rows, own_shard
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.items import Items
from hf_dis.models.head_search import find_head
from hf_dis.models.provenance import StoredValue, digest_of, stored_values
from hf_dis.models.spread import is_fully_sharded, reshard, whole
from hf_dis.models.tasks import find_task, num_outputs
from hf_dis.precision import product_type
from hf_dis.teacher.logit_checks import check_support
from hf_dis.teacher.online import OnlineTeacher
from hf_dis.teacher.targets import TeacherTargets, chunk_items

# Elements of a block of rows that exist at a time: 64 MiB in float32.
BLOCK_ELEMENTS = 2**24


class ShardedTeacher(OnlineTeacher):
    """Ranks the logits of a teacher whose output head is spread over the processes; all of them call it together.

    Args:
        model, num_classes, temperature, depth, context, may_mask: as for :class:`OnlineTeacher`.
        has_same_items: all processes have the same items.

    Raises:
        ValueError: if a process holds none of the first C classes.
    """

    def __init__(self, model: nn.Module, *args: Any, has_same_items: bool, **keywords: Any):
        super().__init__(model, *args, **keywords)
        self._has_same_items = has_same_items
        reshard(model)  # whole rows that FSDP keeps may be freed later
        head = model.get_submodule(find_head(model, self.num_outputs))
        self._rows = OwnRows(head.weight, head.bias, head.shard) if isinstance(head, ShardedHead) else own_rows(head)
        shard = self._rows.shard
        size = min(len(shard), self.num_classes - shard.start)
        self.sizes = shard.gather(torch.tensor([size], device=self._rows.weight.device))[:, 0].tolist()
        if min(self.sizes) < 1:
            raise ValueError(
                f"the processes hold {self.sizes} of the {self.num_classes} classes that the teacher shares with the "
                "student: each needs a class; use fewer processes, or a whole teacher"
            )

    def __call__(self, inputs: dict[str, Tensor], items: Items, check_values: bool = True) -> Iterator[TeacherTargets]:
        """As :meth:`OnlineTeacher.__call__`; without items a process yields chunks without items."""
        features = self._features(inputs, items)
        return (
            super().__call__(inputs, items, check_values) if features is None else self._ranked(features, check_values)
        )

    def all_classes(
        self, inputs: dict[str, Tensor], items: Items, check_values: bool = True
    ) -> Iterator[Tensor] | ShardedAnswers:
        """As :meth:`OnlineTeacher.all_classes`; :class:`ShardedAnswers` unless only the whole model can answer."""
        features = self._features(inputs, items)
        if features is None:
            return super().all_classes(inputs, items, check_values)
        return ShardedAnswers(self, features, check_values)

    def _identifying(self) -> Iterator[tuple[str, Tensor]]:
        """As :meth:`OnlineTeacher._identifying`, without what depends on the number of processes."""
        heads = tuple(f"{name}." for name in sharded_heads(self.model))
        for name, value in stored_values(self.model):
            if not name.startswith(heads) and not isinstance(value, DTensor):
                yield name, value

    def _ranked(self, features: Tensor, check_values: bool) -> Iterator[ShardTargets]:
        for logits, exchange, first_item in self.chunks(features):
            targets = ShardTargets(logits, self.temperature, self.depth, exchange)
            _check_finite(targets, first_item, check_values)
            yield targets
            del targets, logits  # the next chunk is computed without this one in memory

    def chunks(self, features: Tensor, sizes: Sequence[int] | None = None) -> Iterator[tuple[Tensor, SameItems, int]]:
        """Yields the logits of the own classes, ``[M, S]``, the exchange of their items, and the first own item.

        Args:
            features: input of the output layer for the items of this process, ``[N, d]``.
            sizes: the items of a process in each chunk; None: as many as the device has memory for.
        """
        shard, device, numbers = self._rows.shard, features.device, self.numbers(features)
        if sizes is None:
            most = max(numbers)
            size = chunk_items(most * len(numbers), max(self.sizes), device) // len(numbers)
            sizes = parts(most, max(1, size))
        with self.stream.context():
            dtype = product_type(features)
        size = self.sizes[shard.index]
        weight, bias = (None if one is None else one[:size].to(dtype) for one in self._rows[:2])
        first = 0
        for size in sizes:
            own = features[first : first + size].to(dtype)
            if self._has_same_items:
                exchange = SameItems(shard, self.sizes)
            else:
                here = [max(0, min(size, number - first)) for number in numbers]
                exchange = OwnItems(shard, self.sizes, here, size)
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                logits = self.stream.after_head(F.linear(exchange.everyones(own), weight, bias))
            if not self.may_mask:
                check_support(logits, first)
            yield logits, exchange, first
            del logits
            first += size

    @property
    def shard(self) -> VocabShard:
        """The classes whose rows this process holds."""
        return self._rows.shard

    def whole_sizes(self, features: Tensor) -> list[int]:
        """As :meth:`hf_dis.distributed.shard_targets.SpreadTeacher.whole_sizes`."""
        most = max(self.numbers(features))
        return parts(most, self.stream.items_of_chunk(most, features.device))

    def numbers(self, features: Tensor) -> list[int]:
        """The number of items of each process, or the number that all processes have."""
        if self._has_same_items:
            return [len(features)]
        return self._rows.shard.gather(torch.tensor([len(features)], device=features.device))[:, 0].tolist()

    def _features(self, inputs: dict[str, Tensor], items: Items) -> Tensor | None:
        """The input of the output layer; None where only the whole model can answer."""
        if self.stream.splits(inputs, items) and self.stream.after_head.bias is None:
            return self.stream.features(inputs, items)
        if self._has_same_items and not is_fully_sharded(self.model):
            return None
        raise ValueError(
            f"the teacher {type(self.model).__name__} has a sharded head, and computes its logits by more than this "
            "head from one vector per item: load the teacher whole, or leave its head whole"
        )


def _check_finite(targets: ShardTargets, first_item: int, check_values: bool) -> None:
    if check_values and not targets.of_everyone.isfinite().all():  # so that all processes end
        bad = (~targets.log_normaliser[:, 0].isfinite()).nonzero()[:, 0] + first_item
        raise FloatingPointError(
            f"the teacher's logits hold NaN or Inf in items {bad.tolist()[:20]} of the batch, or are -inf for all "
            f"classes. {PRECISION}"
        )


def is_spread(teacher: nn.Module) -> bool:
    """Returns True if a process has a part of the classes of a teacher's output head."""
    return bool(sharded_heads(teacher)) or (is_tensor_parallel(teacher) and isinstance(_head(teacher).weight, DTensor))


def tensor_parallel_classes(teacher: nn.Module, num_classes: int) -> VocabShard | None:
    """Returns the classes of a tensor-parallel teacher that this process holds; None for any other teacher.

    Args:
        teacher: of a transformers model.
        num_classes: C, the first classes of the teacher, which it shares with the student.
    """
    shard = own_shard(_head(teacher)) if is_tensor_parallel(teacher) else None
    if shard is None or shard.start >= num_classes:
        return None
    return VocabShard(shard.start, min(shard.stop, num_classes), shard.group)


def _head(teacher: nn.Module) -> nn.Module:
    return teacher.get_submodule(find_head(teacher, num_outputs(teacher, find_task(teacher))))


def whole_digest(teacher: nn.Module) -> str:
    """Computes :func:`hf_dis.models.provenance.weights_digest` of a teacher that is spread over processes.

    Every process has to call it. At most one parameter of the body is whole at a time, and a block of a sharded head.
    """
    heads = sharded_heads(teacher)

    def whole_values() -> Iterator[StoredValue]:
        for name, value in sorted(stored_values(teacher), key=lambda named: named[0]):
            head = heads.get(name.rpartition(".")[0])
            if head is not None:
                yield StoredValue(name, value.dtype, (head.out_features, *value.shape[1:]), _all_rows(value, head))
            else:
                yield StoredValue(name, value.dtype, tuple(value.shape), [whole(value)])

    return digest_of(whole_values())


def _all_rows(rows: Tensor, head: ShardedHead) -> Iterator[Tensor]:
    """The rows of all processes in order, block by block, on every process."""
    block_rows = max(1, BLOCK_ELEMENTS // rows[0].numel())
    for process, size in enumerate(head.sizes):
        first = 0
        for number in parts(size, block_rows):
            is_own = process == head.shard.index
            block = rows[first : first + number] if is_own else rows.new_empty(number, *rows.shape[1:])
            if head.shard.number > 1:
                dist.broadcast(block, process)  # a sharded head is held by all processes of the run
            yield block
            first += number
