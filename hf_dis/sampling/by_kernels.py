"""Samples by kernels: with all columns, or without those of the shared tails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.sampling.answers import Answers
from hf_dis.sampling.sample import ClassSample, StepClasses
from hf_dis.sampling.tails import Tails


class RankPoints(NamedTuple):
    """The points of systematic samples of ranks, and the inclusion probabilities that the points are laid on.

    All are None where each item holds all its ranks.

    Attributes:
        expected, cumulative: π of the ranks and their running sum, ``[1, m]`` for all items, or ``[N, m]``.
        starts: the first point of each item, within [0, 1), ``[N, 1]``.
    """

    expected: Tensor | None = None
    cumulative: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def of(cls, density: Tensor, num_sampled: int, starts: Tensor) -> RankPoints:
        """Lays out the inclusion probabilities of a density.

        Args:
            density: over ranks, falling, ``[m]`` or ``[N, m]``.
            num_sampled: K.
            starts: of the items.
        """
        from hf_dis.sampling.triton_assembly import rank_inclusion

        return cls(*rank_inclusion(density.view(-1, density.shape[-1]), num_sampled), starts)

    @property
    def are_all(self) -> bool:
        """Each item holds all its ranks."""
        return self.expected is None


class Sampling(NamedTuple):
    """The classes of a step before their columns are made.

    Attributes:
        answers: the teacher's targets, with columns as kernels compute them.
        tails: the shared tails.
        points: of the ranks.
        labels: class ids ``[N]``, or None.
        class_mass: as :class:`StepClasses` has it.
        num_sampled: K.
    """

    answers: Answers
    tails: Tails
    points: RankPoints
    labels: Tensor | None
    class_mass: Tensor
    num_sampled: int

    def assembled(self) -> ClassSample:
        """Makes all columns of each item."""
        from hf_dis.sampling.triton_assembly import assemble

        answers = self.answers
        names = ("item_ids", "log_weights", "certain", "log_probs", "target", "ranks", "rank_weights", "outside_top")
        given = answers.ids, answers.columns, *self.tails, *self.points, self.labels, self.num_sampled
        return ClassSample(**self._others(), **dict(zip(names, assemble(*given), strict=True)))

    def without_tails(self) -> SampleWithoutTails:
        """Makes the columns of each item's own classes."""
        from hf_dis.sampling.triton_item_columns import item_columns

        answers, tails = self.answers, self.tails
        names = ("item_ids", "log_weights", "log_probs", "target", "tail_mass", "ranks", "rank_weights")
        given = answers.ids, answers.log_probs, answers.label_log_probs, self.num_sampled, *self.points, self.labels
        return SampleWithoutTails(
            held_ids=answers.ids,
            inclusion=tails.inclusion,
            tail_log_probs=answers.tail_log_probs,
            **self._others(),
            **dict(zip(names, item_columns(*given), strict=True)),
        )

    def _others(self) -> dict[str, Tensor | bool]:
        return {
            "tail_ids": self.tails.ids,
            "class_mass": self.class_mass,
            "has_label": self.labels is not None,
            "with_replacement": False,
            "all_ranks_certain": self.points.are_all,
        }


@dataclass(frozen=True, kw_only=True)
class SampleWithoutTails(StepClasses):
    """The classes of one step, with what the columns of the tails are computed from by the kernel that needs them.

    The tail's classes are certain to be in the tail with the probability π. An item uses those that it holds in no
    other column, with the weight 1/π. The targets of these columns share the mass of the tail, as
    :func:`hf_dis.sampling.sample.estimated_target` divides it.

    Attributes:
        log_weights, log_probs: of the item's own classes, as :class:`ClassSample` has them, ``[N, R]``.
        target: estimated teacher probabilities of these classes; with the mass of the tail each item sums to one, or
            to less where no class can carry a mass, ``[N, R]``.
        held_ids: the item's ranked classes, which it does not use in its tail, ``[N, m]``.
        inclusion: π of the tails' classes, ``[G, K_t]``.
        tail_log_probs: the teacher's log-probabilities of the tail's classes, ``[N, K_t]``.
        tail_mass: the teacher's probability of all classes that the tail is sampled for, ``[N]``.
    """

    log_weights: Tensor
    log_probs: Tensor
    target: Tensor
    held_ids: Tensor
    inclusion: Tensor
    tail_log_probs: Tensor
    tail_mass: Tensor

    @classmethod
    def of(cls, sample: ClassSample) -> SampleWithoutTails:
        """Takes a sample that has no shared tail.

        Args:
            sample: with one tail of no class.
        """
        own = sample.log_probs
        return cls(
            item_ids=sample.item_ids,
            tail_ids=sample.tail_ids,
            ranks=sample.ranks,
            rank_weights=sample.rank_weights,
            class_mass=sample.class_mass,
            has_label=sample.has_label,
            with_replacement=sample.with_replacement,
            log_weights=sample.log_weights,
            log_probs=own,
            target=sample.target,
            held_ids=sample.item_ids[:, :0],
            inclusion=own.new_empty(1, 0),
            tail_log_probs=own.new_empty(len(own), 0),
            tail_mass=torch.zeros_like(own[:, 0]),
        )

    def tail_sums(self, signal: Tensor) -> Tensor:
        """As :meth:`StepClasses.tail_sums`."""
        from hf_dis.sampling.triton_learning import tail_sums_outside

        return tail_sums_outside(signal, self.held_ids, self.tail_ids, self.finite)
