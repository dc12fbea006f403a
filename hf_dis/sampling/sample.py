"""The sample of one training step: classes, importance weights and the teacher's targets.

A sample is made of up to three strata: classes sampled from each item's teacher ranking, the item's label, and a tail
that items share. A stratum carries importance weights ω = 1/π and the teacher's exact mass, so that the losses need
nothing else. The strata are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.sampling.designs import Updates
from hf_dis.sampling.tails import by_tail

# Sums over the items of a step that a proposal learns from, dense or sparse; summed over processes before an update.
Statistics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepClasses:
    """The classes of one step: ``R`` per-item columns (K ranked, then the label's if there is one), ``K_t`` shared.

    There are G tails, and item i uses tail ``i mod G``.

    Attributes:
        item_ids: class ids sampled per item, ``[N, R]``.
        tail_ids: class ids of each tail, ascending, ``[G, K_t]``.
        ranks: the teacher's rank of the K ranked columns, ``[N, K]``; 0 is the best-ranked class.
        rank_weights: ω of the K ranked columns before the label is taken out, ``[N, K]``.
        class_mass: the teacher's probability of each class outside the items' ranked classes, summed over items, to
            rounding, ``[C]``; empty for a proposal without a use for it.
        has_label: column ``R - 1`` is the label's.
        with_replacement: an item may hold a class in several of its ranked columns.
        all_ranks_certain: every item holds all ranks that it samples from, each with certainty.
        updates: the sample of the classes that update the head; all sampled classes update the head if None.
        finite: true for the items that statistics count, those with a finite signal, ``[N]``; all of them if None.
    """

    item_ids: Tensor
    tail_ids: Tensor
    ranks: Tensor
    rank_weights: Tensor
    class_mass: Tensor
    has_label: bool
    with_replacement: bool
    all_ranks_certain: bool = False
    updates: Updates | None = None
    finite: Tensor | None = None

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def label_column(self) -> int:
        """The column of the label, where the sample was made with labels."""
        return self.item_ids.shape[1] - 1

    def tail_sums(self, signal: Tensor) -> Tensor:
        """Sums over the items of each tail: the squared signal, and the number of items; float32, ``[G·K_t, 2]``.

        An item counts at the classes outside its ranked ones.

        Args:
            signal: at the columns of the tail, ``[N, K_t]``.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ClassSample(StepClasses):
    """The classes of one step with all columns.

    Attributes:
        log_weights: log ω of every column, ``[N, R + K_t]``; ``-inf`` where an item does not use a column because
            another of its columns holds the same class.
        certain: true where the class had the inclusion probability 1, ``[N, R + K_t]``; true or false at a column that
            is not used.
        log_probs: the teacher's log-probabilities at the temperature, ``[N, R + K_t]``.
        target: estimated teacher probabilities, each item sums to one, ``[N, R + K_t]``.
        outside_top: true where a shared class lies outside the item's ranked classes, ``[N, K_t]``.
    """

    log_weights: Tensor
    certain: Tensor
    log_probs: Tensor
    target: Tensor
    outside_top: Tensor

    def tail_sums(self, signal: Tensor) -> Tensor:
        """As :meth:`StepClasses.tail_sums`."""
        num_tails = len(self.tail_ids)
        if self.finite is not None and uses_triton(signal.device):
            from hf_dis.sampling.triton_learning import tail_sums

            return tail_sums(signal, self.outside_top, self.finite, num_tails)
        met = self.outside_top if self.finite is None else self.outside_top & self.finite[:, None]
        squared = torch.where(met, signal, 0).square()
        sums = torch.empty(2, num_tails, signal.shape[1], dtype=torch.float32, device=signal.device)
        for values, total in zip((squared, met), sums, strict=True):
            torch.sum(by_tail(values, num_tails), 1, dtype=torch.float32, out=total)
        return sums.flatten(1).T

    def finite_items(self, signal: Tensor) -> Tensor:
        """True for items whose signal is finite at every column that they use, ``[N]`` for ``[N, R + K_t]``.

        The student's probability at an unused column may overflow: no other column bounds its logit.
        """
        if uses_triton(signal.device):
            from hf_dis.sampling.triton_learning import finite_items

            return finite_items(signal, self.log_weights)
        return signal.masked_fill(self.log_weights == -torch.inf, 0).sum(1).abs() < torch.inf

    def of_items(self, items: Tensor, tails: Tensor) -> ClassSample:
        """The sample of some of the items, without a sample of updates.

        Args:
            items: places of the items, ``[n]``.
            tails: the tails in another order, ``[G]``, so that the i-th of the items uses the tail ``i mod G``.
        """
        return replace(
            self,
            item_ids=self.item_ids.index_select(0, items),
            tail_ids=self.tail_ids.index_select(0, tails),
            log_weights=self.log_weights.index_select(0, items),
            certain=self.certain.index_select(0, items),
            log_probs=self.log_probs.index_select(0, items),
            target=self.target.index_select(0, items),
            ranks=self.ranks.index_select(0, items),
            rank_weights=self.rank_weights.index_select(0, items),
            outside_top=self.outside_top.index_select(0, items),
            updates=None,
        )


class Stratum(NamedTuple):
    """Columns of a sample among which the teacher's exact mass is known.

    Attributes:
        ids: classes, ``[N, K]``, or of each tail, ``[G, K]``.
        log_weights: log ω, ``[N, K]``; 0 where certain, and ``-inf`` where a column is not used.
        certain: true where the class has the inclusion probability 1, ``[N, K]``.
        log_probs: the teacher's log-probabilities, ``[N, K]``.
        mass: the teacher's probability of all classes that the stratum samples from, ``[N]``.
    """

    ids: Tensor
    log_weights: Tensor
    certain: Tensor
    log_probs: Tensor
    mass: Tensor

    def without(self, label: Stratum, held: Tensor) -> Stratum:
        """Gives way to the label's own column: columns of the label's class are not used.

        Args:
            label: the stratum of the label, ``[N, 1]``.
            held: true where the label's class is one of this stratum, ``[N]``; its mass is taken out there.
        """
        log_weights = self.log_weights.masked_fill(self.ids == label.ids, -torch.inf)
        return self._replace(log_weights=log_weights, mass=torch.addcmul(self.mass, label.mass, held, value=-1))

    def target(self) -> Tensor:
        """Estimates the teacher's probabilities by :func:`estimated_target`, ``[N, K]``."""
        return estimated_target(self.log_probs, self.log_weights, self.certain, self.mass[:, None])


def estimated_target(log_probs: Tensor, log_weights: Tensor, certain: Tensor, mass: Tensor | float) -> Tensor:
    """Estimates the teacher's probabilities so that they sum to a mass, ``[N, K]``.

    Certain classes keep their probability. The other classes share the rest of the mass in proportion to ω·p (a ratio
    estimator). Where no sampled class can carry the rest, the rest is left out.

    Args:
        log_probs, log_weights, certain: as :class:`Stratum` has them, ``[N, K]``.
        mass: the teacher's probability of all classes that were sampled from, ``[N, 1]`` or a number.
    """
    weighted = log_probs + log_weights  # log ω·p: log p of a certain class, -inf of an unused one
    exact = weighted.exp().mul_(certain)
    rest = (mass - exact.sum(1, keepdim=True)).clamp_min_(0)
    share = weighted.masked_fill_(certain, -torch.inf).softmax(1).nan_to_num_(0)
    return torch.addcmul(exact, share, rest)


def normalised(target: Tensor) -> Tensor:
    """Scales the target of each item to a sum of one, in place, ``[N, R]``.

    A target is left at zero where the teacher gives every sampled class the probability 0: the item has no loss.
    """
    return target.div_(target.sum(1, keepdim=True).clamp_min_(torch.finfo(target.dtype).tiny))


def item_counts(num_items: int, finite: Tensor | None) -> Statistics:
    """The numbers of items with and without a finite signal."""
    if finite is not None and uses_triton(finite.device):
        from hf_dis.sampling.triton_learning import item_counts

        items, not_finite = item_counts(finite).unbind()
        return {"items": items, "not_finite": not_finite}
    items = torch.tensor(num_items) if finite is None else finite.sum()
    return {"items": items, "not_finite": num_items - items}


def label_stratum(labels: Tensor, log_probs: Tensor) -> Stratum:
    """The label's class as a stratum of its own, certain to be sampled; log-probabilities are ``[N, 1]``."""
    ids = labels[:, None]
    log_weights = torch.zeros_like(ids, dtype=torch.float32)
    return Stratum(ids, log_weights, torch.ones_like(ids, dtype=torch.bool), log_probs, log_probs[:, 0].exp())
