"""The loss on all classes of a tensor-parallel head: each process computes its own classes, for the same items."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from hf_dis.distributed.exact_head import CPU_PASS_ELEMENTS, ShardClasses
from hf_dis.distributed.shard_targets import ShardedAnswers
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.loss.exact import PASS_ELEMENTS
from hf_dis.loss.exact_head import BLOCK_BYTES, Gradients, HeadInput, HeadLoss, Teacher
from hf_dis.loss.objective import Objective
from hf_dis.teacher.cached import CachedTargets


class SpreadHeadLoss(HeadLoss):
    """The loss of every item on all classes, differentiable once in features and the rows of this process.

    All processes have the same items. Every process has to compute the loss, and to run its backward.

    Args:
        head: the rows of this process, and the input of the head. The gradient of the input is that of these rows
            alone: give :meth:`hf_dis.VocabShard.copied` features.
        shard: the classes of the rows.
        objective: the loss; C counts the classes of all processes, and each process has one of them at least.
        again: as for :class:`HeadLoss`.
        factors: as for :class:`HeadLoss`.
    """

    def __init__(
        self,
        head: HeadInput,
        shard: VocabShard,
        objective: Objective,
        again: Callable[[], Teacher],
        factors: Tensor | None = None,
    ):
        self._given, self._most = (shard, objective), shard.rows_each
        self._own = VocabShard(shard.start, min(shard.stop, objective.num_classes), shard.group)
        own = objective._replace(num_classes=len(self._own), classes=ShardClasses(self._own))
        super().__init__(head, own, again, factors)
        # The same on all processes, whose shards differ in size.
        self._block_items = max(1, BLOCK_BYTES // (self._most * head.dtype.itemsize))

    def add(self, chunk: Tensor | CachedTargets | None) -> None:
        """As :meth:`hf_dis.loss.exact.ExactTerms.add`; logits are those of all classes, or of the own ones."""
        if isinstance(chunk, Tensor) and chunk.shape[1] == self._given[1].num_classes:
            chunk = chunk[:, self._own.start : self._own.stop]
        super().add(chunk)

    def add_all(self, teacher: Iterable[Tensor | CachedTargets] | None) -> None:
        """As :meth:`hf_dis.loss.exact.ExactTerms.add_all`; a teacher with the same shards sends nothing."""
        if isinstance(teacher, ShardedAnswers) and teacher.rows_each == self._most:
            teacher = teacher.blocks()
        super().add_all(teacher)

    def _pass_items(self, logits: Tensor) -> int:
        elements = CPU_PASS_ELEMENTS if logits.device.type == "cpu" else PASS_ELEMENTS
        return max(1, elements // self._most)

    def _recomputed(self) -> Callable[[Tensor], Gradients]:
        return partial(_weighted_gradients, self._head, *self._given, self._again)


def _weighted_gradients(
    head: HeadInput, shard: VocabShard, objective: Objective, again: Callable[[], Teacher], factors: Tensor
) -> Gradients:
    """The gradients where the items count differently, ``factors`` ``[N]``: computed from the start."""
    exact = SpreadHeadLoss(head, shard, objective, again, factors)
    exact.add_all(again())
    return exact.gradients
