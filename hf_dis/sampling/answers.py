"""The part of a teacher's answers that a sample is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.sampling.sample import Stratum
from hf_dis.teacher.targets import log_probs


class Ranked(NamedTuple):
    """The sampled ranks of items, ``[N, K]``, and their classes as a stratum."""

    ranks: Tensor
    stratum: Stratum


class Logits(NamedTuple):
    """A teacher's answers to a chunk of items: all that a sample needs of the chunk, and no more.

    All else is computed once for all items: on an accelerator a launch per chunk costs more than its work.

    Attributes:
        ids: the m best-ranked classes of each item, ``[n, m]``.
        highest: logits of these classes, ``[n, m]``.
        tails: logits of the classes of the item's shared tail, ``[n, K_t]``.
        labels: the label's logit, ``[n, 1]``; None without labels.
        log_normaliser: log Σ exp(logit / τ) over all classes, ``[n, 1]``.
        counted: the items that the mass of the chunk counts.
        items_per_counted: the items that each counted item stands for.
        ranked: the sampled ranks, where all C ranks are sampled from.
    """

    ids: Tensor
    highest: Tensor
    tails: Tensor
    labels: Tensor | None
    log_normaliser: Tensor
    counted: slice
    items_per_counted: float
    ranked: Ranked | None


class Answers(NamedTuple):
    """The part of a teacher's answers that a sample is made from.

    Attributes:
        ids: the m best-ranked classes of each item, ``[N, m]``.
        log_probs: log-probabilities of these classes, ``[N, m]``.
        tail_log_probs: log-probabilities of the classes of the item's shared tail, ``[N, K_t]``.
        label_log_probs: log-probability of the label, ``[N, 1]``; None without labels.
        ranked: the sampled ranks, where all C ranks are sampled from.
    """

    ids: Tensor
    log_probs: Tensor
    tail_log_probs: Tensor
    label_log_probs: Tensor | None
    ranked: Ranked | None

    @classmethod
    def of(cls, parts: Sequence[Logits], temperature: float) -> Answers:
        """Joins the answers to consecutive chunks of items."""
        normaliser = _cat([part.log_normaliser for part in parts])

        def joined(logits: Sequence[Tensor]) -> Tensor:
            return log_probs(_cat(logits), normaliser, temperature)

        ranked = [part.ranked for part in parts]
        return cls(
            _cat([part.ids for part in parts]),
            joined([part.highest for part in parts]),
            joined([part.tails for part in parts]),
            None if parts[0].labels is None else joined([part.labels for part in parts]),
            None if ranked[0] is None else _cat_ranked(ranked),
        )

    def ranked_mass(self, parts: Sequence[Logits], num_classes: int) -> Tensor:
        """Sums the probability of each class over the counted items that rank the class, ``[C]``.

        Args:
            parts: the chunks that the answers were joined from.
            num_classes: C.
        """
        mass, first_item = self.log_probs.new_zeros(num_classes), 0
        alike: dict[float, list[slice]] = {}  # most chunks are of one size
        for part in parts:
            last_item = first_item + len(part.ids)
            alike.setdefault(part.items_per_counted, []).append(slice(first_item, last_item, part.counted.step))
            first_item = last_item
        for items_per_counted, counted in alike.items():
            ids, probs = (_cat([values[items] for items in counted]) for values in (self.ids, self.log_probs))
            mass.index_add_(0, ids.flatten(), probs.exp().flatten(), alpha=items_per_counted)
        return mass


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Joins tensors, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cat_ranked(parts: Sequence[Ranked]) -> Ranked:
    strata = zip(*(part.stratum for part in parts), strict=True)
    return Ranked(_cat([part.ranks for part in parts]), Stratum(*map(_cat, strata)))
