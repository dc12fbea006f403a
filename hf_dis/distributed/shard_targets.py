"""The targets of a teacher whose classes are spread over processes: ranked, or on all classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.distributed.exchange import OwnItems, SameItems
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.sampling.tails import of_items
from hf_dis.teacher.logit_checks import check_teacher_logits
from hf_dis.teacher.ranking import Candidates, top_ranked
from hf_dis.teacher.targets import TeacherTargets, block_items, log_probs, widen

PRECISION = "Check these inputs, and the teacher's precision: a float16 teacher overflows at 65,504, so try bfloat16"


class ShardTargets(TeacherTargets):
    """Ranks the logits of a teacher whose classes are spread over processes, at a temperature.

    All processes have to make it, and to call each method, together.

    Args:
        logits: of the own classes, for the items that the shards answer about, ``[M, S]``.
        temperature: τ > 0.
        depth: m, the ranks to resolve; at most C are resolved.
        exchange: between the processes.

    Attributes:
        of_everyone: log Σ exp(logit / τ) of the items that the shards answer about, ``[M, 1]``.
    """

    is_whole = False

    def __init__(self, logits: Tensor, temperature: float, depth: int, exchange: SameItems):
        self.logits, self.temperature, self._exchange = logits, temperature, exchange
        widths = [min(depth, size) for size in exchange.sizes]
        own, ids = top_ranked(logits, widths[exchange.shard.index])
        self._highest, self._ids = own, ids
        missing = 0, max(widths) - own.shape[1]
        parts = exchange.by_shard(F.pad(own, missing)), exchange.by_shard(F.pad(ids + exchange.shard.start, missing))
        own, ids = (
            torch.cat([part[:, :width] for part, width in zip(values, widths, strict=True)], 1) for values in parts
        )
        highest, places = own.topk(min(depth, sum(exchange.sizes)))
        self.of_everyone = self._normalised()
        ranked = Candidates(highest, ids.gather(1, places), sum(exchange.sizes))
        self._found = exchange.own(self.of_everyone).T, ranked
        self.counted = slice(0, len(highest), 1)

    def __len__(self) -> int:
        return len(self.ids)

    def _normalised(self) -> Tensor:
        """log Σ exp(logit / τ) over the classes of all shards, for all items, ``[M, 1]``."""
        wide = torch.promote_types(self.logits.dtype, torch.float32)
        peaks = self._highest[:, :1].to(wide).clamp_min(torch.finfo(wide).min) / self.temperature
        items = block_items(self.logits)
        totals = [
            (widen(part) / self.temperature).sub_(peak).exp_().sum(1, keepdim=True)
            for part, peak in zip(self.logits.split(items), peaks.split(items), strict=True)
        ]
        tops, totals = self._exchange.shard.gather(torch.cat([peaks, torch.cat(totals)], 1)).unbind(2)
        top = tops.amax(0)
        return (top + ((tops - top).exp() * totals).sum(0).log())[:, None]

    @property
    def items_per_counted(self) -> float:
        """Returns 0: :meth:`class_mass` is without the ranked classes."""
        return 0.0

    def all_classes(self) -> Tensor:
        """As :meth:`TeacherTargets.all_classes`; the logits of all shards are sent."""
        return self._exchange.side_by_side(self.logits)

    def logits_at(self, ids: Tensor) -> Tensor:
        """As :meth:`TeacherTargets.logits_at`."""
        if not ids.shape[1]:
            return self.logits.new_empty(len(ids), 0)
        ids = self._exchange.everyones(ids) - self._exchange.shard.start
        is_own = (ids >= 0) & (ids < self.logits.shape[1])
        found = self.logits.gather(1, ids.clamp(0, self.logits.shape[1] - 1))
        return self._exchange.joined(torch.where(is_own, found, 0))

    def columns(self, tail_ids: Tensor, labels: Tensor | None, first_item: int) -> Tensor:
        """As :meth:`TeacherTargets.columns`, without kernels."""
        asked = [of_items(tail_ids, first_item, len(self))]
        if labels is not None:
            asked.append(labels[first_item : first_item + len(self), None])
        return torch.cat([self.log_probs, self.log_prob(torch.cat(asked, 1))], 1)

    def log_prob(self, ids: Tensor) -> Tensor:
        """As :meth:`TeacherTargets.log_prob`."""
        return log_probs(self.logits_at(ids), self.log_normaliser, self.temperature)

    def class_mass(self, added: Tensor | None = None) -> Tensor:
        """Sums the probability of each class over the items that do not rank the class, ``[C]``.

        A process has the mass of its own classes alone, from all items. Where logits at the last rank are equal, more
        classes than m count as ranked.

        Args:
            added: as for :meth:`TeacherTargets.class_mass`.
        """
        exchange, temperature = self._exchange, self.temperature
        normaliser, last = self.of_everyone, exchange.everyones(self.highest[:, -1:])
        if isinstance(exchange, OwnItems):  # a filler has no probability
            is_filler = ~exchange.is_item.to(normaliser.device)[:, None]
            normaliser = normaliser.masked_fill(is_filler, torch.inf)
        mass = normaliser.new_zeros(self.logits.shape[1])
        items = block_items(self.logits)
        for part, own in zip(self.logits.split(items), normaliser.split(items), strict=True):
            mass += log_probs(part, own, temperature).exp_().sum(0)
        ranked = log_probs(self._highest, normaliser, temperature).exp_() * (self._highest >= last)
        mass = exchange.of_all_classes(mass.index_add_(0, self._ids.flatten(), -ranked.flatten()).clamp_min_(0))
        return mass if added is None else added + mass


class SpreadTeacher(Protocol):
    """A teacher that computes the logits of the classes of this process, as :class:`ShardedAnswers` needs it.

    Attributes:
        num_classes: C.
        shard: the classes of this process.
    """

    num_classes: int
    shard: VocabShard

    def whole_sizes(self, features: Tensor) -> list[int]:
        """The items of a process in each chunk, where the logits of all classes are joined."""

    def chunks(self, features: Tensor, sizes: Sequence[int] | None = None) -> Iterator[tuple[Tensor, SameItems, int]]:
        """Yields the logits of the own classes, the exchange of their items, and the number of the first own item."""


class ShardedAnswers:
    """The logits of a teacher on all classes, for the items of all processes: chunk by chunk, or block by block.

    Args:
        teacher: that answers.
        features: input of the output layer for the items of this process, ``[N, d]``.
        check_values: look for NaN and Inf.
    """

    def __init__(self, teacher: SpreadTeacher, features: Tensor, check_values: bool):
        self._teacher, self._features, self._check = teacher, features, check_values

    @property
    def rows_each(self) -> int:
        """As :attr:`hf_dis.VocabShard.rows_each`."""
        return self._teacher.shard.rows_each

    def __iter__(self) -> Iterator[Tensor]:
        teacher, features = self._teacher, self._features
        first_item = 0
        for logits, exchange, _ in teacher.chunks(features, teacher.whole_sizes(features)):
            logits = exchange.side_by_side(logits)
            check_teacher_logits(logits, teacher.num_classes, first_item, self._check)
            first_item += len(logits)
            yield logits
            del logits

    def blocks(self, sizes: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yields the logits of the own classes for blocks of the items of all processes, ``[P · n, S]``.

        Args:
            sizes: n, the items of each process in a block; a process with fewer items is filled up. None: as many as
                the device has memory for.
        """
        for logits, exchange, _ in self._teacher.chunks(self._features, sizes):
            if self._check:
                highest = logits.amax()
                is_bad = highest.isnan() | (highest == torch.inf)
                if exchange.shard.sum(is_bad.long()):  # so that all processes end
                    raise FloatingPointError(f"the teacher's logits hold NaN or Inf. {PRECISION}")
            yield logits
            del logits


def parts(number: int, size: int) -> list[int]:
    """Divides a number into parts of a size, the last one smaller; at least one part."""
    return [min(size, number - first) for first in range(0, max(1, number), size)]
