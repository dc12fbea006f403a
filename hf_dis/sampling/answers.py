"""The part of a teacher's answers that a sample is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.sampling.sample import Stratum


class Ranked(NamedTuple):
    """The sampled ranks of items, ``[N, K]``, and their classes as a stratum."""

    ranks: Tensor
    stratum: Stratum


class Answers(NamedTuple):
    """The part of a teacher's answers that a sample is made from.

    Attributes:
        ids: the m best-ranked classes of each item, ``[N, m]``.
        log_probs: log-probabilities of these classes, ``[N, m]``.
        tail_log_probs: log-probabilities of the classes of the item's shared tail, ``[N, K_t]``.
        label_log_probs: log-probability of the label, ``[N, 1]``; None without labels.
        class_mass: as in :class:`ClassSample`.
        ranked: the sampled ranks, where all C ranks are sampled from.
    """

    ids: Tensor
    log_probs: Tensor
    tail_log_probs: Tensor
    label_log_probs: Tensor | None = None
    class_mass: Tensor | None = None
    ranked: Ranked | None = None

    @classmethod
    def cat(cls, parts: Sequence[Answers]) -> Answers:
        """Joins the answers of consecutive items, without a class mass."""
        if len(parts) == 1:
            return parts[0]
        ids, log_probs, tails, labels, _, ranked = zip(*parts, strict=True)
        return cls(
            *(torch.cat(values) for values in (ids, log_probs, tails)),
            None if labels[0] is None else torch.cat(labels),
            ranked=None if ranked[0] is None else _cat_ranked(ranked),
        )


def _cat_ranked(parts: Sequence[Ranked]) -> Ranked:
    strata = zip(*(part.stratum for part in parts), strict=True)
    return Ranked(torch.cat([part.ranks for part in parts]), Stratum(*map(torch.cat, strata)))
