"""The loss on all classes of a sharded head, in tiles: some items of all processes by the classes of one process.

Each process computes the logits of its own classes for the items of all processes, block by block. The shards merge
one maximum and one sum per item for each normaliser, and one number per item for each sum over classes. A teacher's
logits, which the process of the item has, are sent to the shards once. Stored targets and labels are sent as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.distributed.shard_targets import ShardedAnswers
from hf_dis.head.sharded import ShardedHead
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.loss.classes import Classes
from hf_dis.loss.exact import PASS_ELEMENTS, check_first_backward
from hf_dis.loss.exact_head import BLOCK_BYTES, Gradients, HeadInput, HeadLoss, Teacher
from hf_dis.loss.objective import Losses, Objective, mixture
from hf_dis.teacher.cached import CachedTargets

# Logits of a pass on a processor. Each pass sends some messages, which take 0.1 ms and more.
CPU_PASS_ELEMENTS = 2**20


class ShardClasses(Classes):
    """Sums over the classes of all shards.

    Args:
        shard: the classes of this process.
    """

    def __init__(self, shard: VocabShard):
        self._shard = shard

    def log_softmax(self, values: Tensor) -> Tensor:
        """As :meth:`Classes.log_softmax`, from one maximum and one sum of each shard."""
        highest = values.amax(1).clamp_min(torch.finfo(values.dtype).min)
        total = (values - highest[:, None]).exp_().sum(1)
        tops, totals = self._shard.gather(torch.stack([highest, total])).unbind(1)
        top = tops.amax(0)
        return (values - top[:, None]).sub_(((tops - top).exp() * totals).sum(0).log()[:, None])

    def sum(self, values: Tensor) -> Tensor:
        """As :meth:`Classes.sum`."""
        return self._shard.sum(values.sum(1))

    def columns(self, ids: Tensor) -> Tensor:
        """As :meth:`Classes.columns`: the classes of this process have a column."""
        return (ids - self._shard.start).clamp_(0, len(self._shard) - 1)

    def only_here(self, values: Tensor, ids: Tensor) -> Tensor:
        """As :meth:`Classes.only_here`."""
        return values.masked_fill((ids < self._shard.start) | (ids >= self._shard.stop), 0)


class _Everyone:
    """The items of all processes, in the order in which blocks of them are computed.

    A block has as many items of each process, one process after another. Processes with fewer items are filled up.

    Args:
        layer: the head.
        num_items: N, of this process.
        itemsize: bytes of a logit.
    """

    def __init__(self, layer: ShardedHead, num_items: int, itemsize: int):
        self.shard, self.sizes = layer.shard, layer.sizes
        self.num_items, numbers = num_items, layer.numbers(num_items)
        self.most = max(numbers)
        self.largest = max(self.sizes)
        processes = self.shard.number
        step = max(1, BLOCK_BYTES // (self.largest * itemsize * processes))
        self.block_items = step * processes
        device = layer.weight.device
        rows = torch.arange(processes * self.most, device=device).view(processes, self.most)
        self.rounds = [block.shape[1] for block in rows.split(step, 1)]
        self._order = torch.cat([block.flatten() for block in rows.split(step, 1)])
        is_item = torch.arange(self.most, device=device) < torch.tensor(numbers, device=device)[:, None]
        self.is_item = is_item.flatten()[self._order]

    def gather(self, values: Tensor) -> Tensor:
        """The values of all items, for those ``[N, ...]`` of this process; zeros where a process is filled up."""
        filled = values.new_zeros(self.most, *values.shape[1:])
        filled[: len(values)] = values.detach()
        return self.shard.gather(filled).flatten(0, 1)[self._order]

    def by_process(self, values: Tensor) -> Tensor:
        """The inverse: the values of the items of each process, ``[P, n, ...]``."""
        found = torch.empty_like(values)
        found[self._order] = values
        return found.view(self.shard.number, self.most, *values.shape[1:])

    def own(self, values: Tensor) -> Tensor:
        """The values of the items of this process, ``[N]``."""
        return self.by_process(values)[self.shard.index, : self.num_items]

    def answers(self, teacher: Iterable[Tensor | CachedTargets]) -> Iterator[Tensor | tuple[Tensor, ...]]:
        """The teacher's targets for each block, from those for the items of this process.

        Raises:
            ValueError: if the teacher has targets of more or fewer than N items.
        """
        # An iterator of chunks starts with a chunk even where there is no item, so that kind and type are known.
        chunks = (_tensors(chunk) for chunk in teacher)
        rest, used = next(chunks), 0
        for size in self.rounds:
            parts, wanted = [], min(size, max(0, self.num_items - used))
            empty = [values[:0] for values in rest]
            while wanted:
                if not len(rest[0]):
                    rest = next(chunks, None)
                    if rest is None:
                        raise self._different(used)
                parts.append([values[:wanted] for values in rest])
                rest = [values[wanted:] for values in rest]
                wanted -= len(parts[-1][0])
                used += len(parts[-1][0])
            rows = [torch.cat(values) for values in zip(empty, *parts, strict=True)]
            filled = [F.pad(values, (0, 0, 0, size - len(values))) for values in rows]
            if len(filled) == 1:
                yield self.shard.by_shard(filled[0], self.sizes).flatten(0, 1)
            else:
                yield tuple(self.shard.gather(values).flatten(0, 1) for values in filled)
        extra = len(rest[0]) + sum(len(chunk[0]) for chunk in chunks)
        if extra:
            raise self._different(used + extra)

    def _different(self, number: int) -> ValueError:
        return ValueError(
            f"the teacher has targets of {number} items, and the student has features of {self.num_items}: give both "
            "the same items"
        )


class ShardedHeadLoss(HeadLoss):
    """The loss of the items of this process on all classes, differentiable once in features, weight and bias.

    Every process has to compute it, and to run its backward. The gradients of weight and bias are divided by the
    number of processes, as those of :class:`ShardedHead`.

    Args:
        head: the rows of this process, and the input of the head for its items.
        layer: the head.
        objective: the loss, of the items of this process; C counts the classes of all processes.
        again: gives the teacher's targets for the items of this process once more, as for :class:`HeadLoss`.
        with_kl: as for :class:`hf_dis.loss.exact.ExactTerms`.
        factors: as for :class:`HeadLoss`.

    Raises:
        ValueError: if C is not the number of classes of the head.
    """

    def __init__(
        self,
        head: HeadInput,
        layer: ShardedHead,
        objective: Objective,
        again: Callable[[], Teacher],
        with_kl: bool = False,
        factors: Tensor | None = None,
    ):
        if objective.num_classes != layer.out_features:
            raise ValueError(
                f"the teacher has {objective.num_classes} classes and the sharded head has {layer.out_features}: "
                "both need the same classes"
            )
        everyone = _Everyone(layer, len(head.features), head.dtype.itemsize)
        features = everyone.gather(head.features.to(head.dtype)).requires_grad_(head.features.requires_grad)
        labels = None if objective.labels is None else everyone.gather(objective.labels)
        classes = ShardClasses(layer.shard)
        shared = objective._replace(num_classes=len(layer.shard), labels=labels, classes=classes)
        factors = None if factors is None else everyone.gather(factors)
        super().__init__(head._replace(features=features), shared, again, factors)
        self._block_items, self._with_kl = everyone.block_items, with_kl
        self._everyone, self._layer, self._own_head, self._own = everyone, layer, head, objective

    def add_all(self, teacher: Teacher) -> None:
        """As :meth:`hf_dis.loss.exact.ExactTerms.add_all`, for the answers about the items of this process."""
        if teacher is None:
            self._add(None, self.num_items)
            return
        everyone = self._everyone
        is_sharded = isinstance(teacher, ShardedAnswers)
        for answer in teacher.blocks(everyone.rounds) if is_sharded else everyone.answers(teacher):
            self._add(answer, len(answer) if isinstance(answer, Tensor) else len(answer[0]))
            del answer  # the next one is computed without this one in memory

    def terms(self) -> Losses:
        """As :meth:`hf_dis.loss.exact.ExactTerms.terms`, of the items of this process."""
        return {name: self._everyone.own(values) for name, values in super().terms().items()}

    def result(self) -> tuple[Tensor, Losses]:
        """As :meth:`HeadLoss.result`, of the items of this process."""
        terms = self.terms()
        loss = mixture(terms, self._own)
        if self.gradients.wanted:
            head, layer, objective, again = self._own_head, self._layer, self._own, self._again

            def weighted(factors: Tensor) -> Gradients:
                exact = ShardedHeadLoss(head, layer, objective, again, factors=factors)
                exact.add_all(again())
                return exact.gradients

            loss = _GivenGradients.apply(*head.parameters, loss, self.gradients, weighted, self._everyone)
        return loss, terms

    def _pass_items(self, logits: Tensor) -> int:
        """The same on all processes, whose shards differ in size."""
        elements = CPU_PASS_ELEMENTS if logits.device.type == "cpu" else PASS_ELEMENTS
        return max(1, elements // self._everyone.largest)

    def _slope(self, slope: Tensor, values: Tensor, items: slice) -> Tensor:
        return super()._slope(slope, values, items) * self._everyone.is_item[items, None]


class _GivenGradients(torch.autograd.Function):
    """A loss per item of this process, with known gradients of the items of all processes; backward uses them up."""

    @staticmethod
    def forward(ctx, features, weight, bias, loss, gradients, weighted, everyone):
        ctx.gradients, ctx.weighted, ctx.everyone = gradients, weighted, everyone
        ctx.dtypes = [None if value is None else value.dtype for value in (features, weight, bias)]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None
        check_first_backward(gradients)
        weighted, ctx.weighted, everyone = ctx.weighted, None, ctx.everyone
        factors = everyone.gather(grad)
        of_items = factors[everyone.is_item]
        if len(of_items) == 0 or bool((of_items == of_items[0]).all()):
            gradients.scale(of_items[:1].expand(len(factors)))
        else:
            del gradients  # the new ones are computed without these in memory
            gradients = weighted(grad)
        features = gradients.features
        if features is not None:
            features = everyone.shard.sum_of_parts(everyone.by_process(features))[: everyone.num_items]
        rows = (None if one is None else one.div_(everyone.shard.number) for one in (gradients.weight, gradients.bias))
        found = zip((features, *rows), ctx.dtypes, strict=True)
        return *(None if value is None else value.to(dtype) for value, dtype in found), None, None, None, None


def _tensors(chunk: Tensor | CachedTargets) -> list[Tensor]:
    return [chunk.ids, chunk.log_probs, chunk.target] if isinstance(chunk, CachedTargets) else [chunk]
