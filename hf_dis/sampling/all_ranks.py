"""The sample of a step where each item holds all the ranks that it samples from, each with certainty."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dis.sampling.answers import Answers
from hf_dis.sampling.sample import ClassSample, estimated_target, normalised
from hf_dis.sampling.tails import Tails, is_outside


def sample_all_ranks(
    answers: Answers, tails: Tails, labels: Tensor | None, class_mass: Tensor, ranks: Tensor
) -> ClassSample:
    """Makes the columns of all items at a time: only the tail's classes can be uncertain, and share what is left.

    Args:
        answers: the teacher's targets, with columns of ranked classes, label and tail.
        tails: the shared tails.
        labels: class ids ``[N]``; always in the sample if given.
        class_mass: as :class:`ClassSample` has it.
        ranks: 0..m-1, ``[m]``.
    """
    ids = answers.ids
    num_items, num_ranked = ids.shape
    outside_top = is_outside(ids, tails.ids)
    own = ids.new_zeros(num_items, num_ranked + (labels is not None), dtype=torch.float32)
    if labels is not None:  # the label's own column takes its place among the ranked classes
        own[:, :num_ranked].masked_fill_(ids == labels[:, None], -torch.inf)
        ids = torch.cat([ids, labels[:, None]], 1)
    log_weights = torch.cat([own, tails.log_weights(outside_top, labels)], 1)
    certain = log_weights <= 0  # the columns that are not used too: their values have no part in anything
    return ClassSample(
        item_ids=ids,
        tail_ids=tails.ids,
        log_weights=log_weights,
        certain=certain,
        log_probs=answers.columns,
        target=target_of(answers.columns, log_weights, certain),
        ranks=ranks.expand(num_items, -1),
        rank_weights=own.new_ones(1, num_ranked).expand(num_items, -1),
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
