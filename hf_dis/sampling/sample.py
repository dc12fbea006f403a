"""Sampling classes: inclusion probabilities, the two samplers, and the sample that one training step works on.

A sample is made of up to three strata: classes sampled from each item's teacher ranking, the item's label, and a tail
that items share. Each stratum carries importance weights ω = 1/π (π: the probability that the class is in the
sample) and the teacher's exact mass, so that the losses need nothing else. Capped probability-proportional-to-size
sampling and the strata are this project's; sampling with replacement is the setting of arXiv 1812.00914.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.sampling.designs import Updates

# Sums over a step from which a proposal learns, dense or sparse; summed over processes before.
Statistics = dict[str, Tensor]


@dataclass(frozen=True)
class ClassSample:
    """The classes of one step: ``R`` per-item columns (K ranked, then the label's if there is one), ``K_t`` shared.

    There are G tails, and item i uses tail ``i mod G``.

    Attributes:
        item_ids: class ids sampled for each item, ``[N, R]``.
        tail_ids: class ids of each tail, ascending, ``[G, K_t]``.
        log_weights: log ω for every column, ``[N, R + K_t]``; ``-inf`` where an item does not use a column
            because it holds the same class in another.
        certain: whether the class was in the sample with probability one, ``[N, R + K_t]``.
        log_probs: the teacher's log-probabilities at the temperature, ``[N, R + K_t]``.
        target: estimated teacher probabilities, each item sums to one, ``[N, R + K_t]``.
        ranks: the teacher's rank of the K ranked columns, ``[N, K]``, 0 is its favourite.
        rank_weights: ω of the K ranked columns before the label is taken out, ``[N, K]``.
        outside_top: whether a shared class lies outside the item's ranked classes, ``[N, K_t]``.
        class_mass: the teacher's probability of each class outside the items' ranked ones, summed over items,
            ``[C]``; empty if the proposal has no use for it.
        has_label: whether column ``R - 1`` is the label's.
        with_replacement: whether an item may hold a class in several of its ranked columns.
        updates: which of the sampled classes update the head; all of them if None.
    """

    item_ids: Tensor
    tail_ids: Tensor
    log_weights: Tensor
    certain: Tensor
    log_probs: Tensor
    target: Tensor
    ranks: Tensor
    rank_weights: Tensor
    outside_top: Tensor
    class_mass: Tensor
    has_label: bool
    with_replacement: bool
    updates: Updates | None = None

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def label_column(self) -> int:
        return self.item_ids.shape[1] - 1

    @staticmethod
    def cat(samples: Sequence[ClassSample]) -> ClassSample:
        """Joins the samples of consecutive chunks of items; they have the layout and the tails in common, of which those
        are left out that no item uses."""
        used_tails = samples[0].tail_ids[: max(1, sum(map(len, samples)))]
        if len(samples) == 1:
            return replace(samples[0], tail_ids=used_tails)
        summed = sum(sample.class_mass for sample in samples)
        whole = ("tail_ids", "class_mass", "has_label", "with_replacement", "updates")
        per_row = [field.name for field in fields(ClassSample) if field.name not in whole]
        joined = {name: torch.cat([vars(sample)[name] for sample in samples]) for name in per_row}
        return replace(samples[0], tail_ids=used_tails, class_mass=summed, **joined)


class Stratum(NamedTuple):
    """Columns of a sample among which the teacher's exact mass is known.

    Attributes:
        ids: classes, ``[N, K]``.
        log_weights: log ω, ``[N, K]``; ``-inf`` where a column is not used.
        certain: whether the class is in the sample with probability one, ``[N, K]``.
        log_probs: the teacher's, ``[N, K]``.
        mass: the teacher's probability of all classes that could have been sampled, ``[N]``.
    """

    ids: Tensor
    log_weights: Tensor
    certain: Tensor
    log_probs: Tensor
    mass: Tensor

    def without(self, label: Stratum, held: Tensor) -> Stratum:
        """Gives way to the label's column: the class is not used here, and where held its mass is taken out."""
        log_weights = self.log_weights.masked_fill(self.ids == label.ids, -torch.inf)
        return self._replace(log_weights=log_weights, mass=self.mass - label.mass * held)

    def target(self) -> Tensor:
        """The teacher's probabilities, estimated so that they sum to the mass, ``[N, K]``.

        Certain classes keep their probability; the others share what is left of the mass in proportion to ω·p (a
        ratio estimator). Where nothing was sampled that could carry the rest, it is left out.
        """
        used = self.log_weights > -torch.inf
        exact = self.log_probs.exp().masked_fill(~(self.certain & used), 0)
        rest = (self.mass - exact.sum(1)).clamp_min(0)
        score = (self.log_probs + self.log_weights).masked_fill(self.certain | ~used, -torch.inf)
        return exact + score.softmax(1).nan_to_num(0) * rest[:, None]
