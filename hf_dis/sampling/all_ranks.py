"""The sample of a step where each item holds all the ranks that it samples from, each with certainty."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.sampling.answers import Answers
from hf_dis.sampling.sample import ClassSample, estimated_target, normalised
from hf_dis.sampling.tails import Tails, is_outside


class AllRanks(NamedTuple):
    """All ranks that an item samples from, made once: each is certain.

    Attributes:
        ranks: 0..m-1, ``[m]``.
        weights, log_weights: ω and log ω, all 1 and all 0, ``[m]``.
    """

    ranks: Tensor
    weights: Tensor
    log_weights: Tensor

    @classmethod
    def of(cls, number: int, device: torch.device | str) -> AllRanks:
        """Makes those of m ranks."""
        return cls(
            torch.arange(number, device=device),
            torch.ones(number, dtype=torch.float32, device=device),
            torch.zeros(number, dtype=torch.float32, device=device),
        )


def sample_all_ranks(
    answers: Answers, tails: Tails, labels: Tensor | None, class_mass: Tensor, certain_ranks: AllRanks
) -> ClassSample:
    """Makes the columns of all items at a time: only the tail's classes can be uncertain, and share what is left.

    Args:
        answers: the teacher's targets, with columns of ranked classes, label and tail.
        tails: the shared tails.
        labels: class ids ``[N]``; always in the sample if given.
        class_mass: as :class:`ClassSample` has it.
        certain_ranks: the m ranks.
    """
    ids, num_items = answers.ids, len(answers.ids)
    outside_top = is_outside(ids, tails.ids)
    own = [certain_ranks.log_weights.expand(num_items, -1)]
    if labels is not None:  # the label's own column takes its place among the ranked classes: log ω is log 0 there
        own = [torch.log(ids != labels[:, None]), own[0][:, :1]]
        ids = torch.cat([ids, labels[:, None]], 1)
    log_weights = torch.cat([*own, tails.log_weights(outside_top, labels)], 1)
    certain = log_weights <= 0  # the columns that are not used too: their values have no part in anything
    return ClassSample(
        item_ids=ids,
        tail_ids=tails.ids,
        log_weights=log_weights,
        certain=certain,
        log_probs=answers.columns,
        target=target_of(answers.columns, log_weights, certain),
        ranks=certain_ranks.ranks.expand(num_items, -1),
        rank_weights=certain_ranks.weights.expand(num_items, -1),
        outside_top=outside_top,
        class_mass=class_mass,
        has_label=labels is not None,
        with_replacement=False,
        all_ranks_certain=True,
    )


def target_of(log_probs: Tensor, log_weights: Tensor, certain: Tensor) -> Tensor:
    """Estimates the teacher's probabilities from all columns at a time; each item sums to one, ``[N, R]``.

    Args:
        log_probs, log_weights, certain: as :func:`hf_dis.sampling.sample.estimated_target` takes them, ``[N, R]``.
    """
    return normalised(estimated_target(log_probs, log_weights, certain, 1.0))
