"""The part of a teacher's targets that a sample is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.sampling.sample import Stratum
from hf_dis.sampling.tails import at_tails, in_turns, of_items
from hf_dis.teacher.ranking import Candidates
from hf_dis.teacher.targets import TeacherTargets, log_probs_by_parts

# Ids of labels and tails, 8 MiB, up to which a step holds them side by side on an accelerator, for all items.
JOINED_IDS = 2**20


class Ranked(NamedTuple):
    """The sampled ranks of items, ``[N, K]``, and their classes as a stratum."""

    ranks: Tensor
    stratum: Stratum


class Chosen(NamedTuple):
    """The classes that a step asks a teacher about, whatever their rank.

    Attributes:
        tail_ids: class ids of each tail, ``[G, K_t]``.
        labels: class ids of all items, ``[N]``; None without labels.
        ids: the label and the classes of the item's tail, ``[N, 1 + K_t]``, where one gather per chunk takes both;
            None elsewhere.
    """

    tail_ids: Tensor
    labels: Tensor | None
    ids: Tensor | None

    @classmethod
    def of(cls, tail_ids: Tensor, labels: Tensor | None, chunk_items: int) -> Chosen:
        """Joins the ids where that saves launches, and takes little memory.

        Args:
            tail_ids, labels: as the attributes.
            chunk_items: items of the first chunk.
        """
        by_plain_torch = tail_ids.device.type != "cpu" and not uses_triton(tail_ids.device)
        has_chunks = labels is not None and chunk_items < len(labels)
        if not (by_plain_torch and has_chunks and len(labels) * (1 + tail_ids.shape[1]) <= JOINED_IDS):
            return cls(tail_ids, labels, None)
        return cls(tail_ids, labels, side_by_side(tail_ids, labels))

    def logits(self, targets: TeacherTargets, first_item: int) -> tuple[Tensor, ...]:
        """The logits of a chunk: of labels and tails, ``[n, 1 + K_t]``, or of each, or of tails alone.

        Args:
            targets: of the chunk.
            first_item: the number of the chunk's first item.
        """
        here = slice(first_item, first_item + len(targets))
        if self.ids is not None:
            return (targets.logits_at(self.ids[here]),)
        if targets.is_whole:
            tails = at_tails(targets.logits, self.tail_ids, first_item)
        else:
            tails = targets.logits_at(of_items(self.tail_ids, first_item, len(targets)))
        return (tails,) if self.labels is None else (targets.logits_at(self.labels[here, None]), tails)


def side_by_side(tail_ids: Tensor, labels: Tensor) -> Tensor:
    """Joins the label of each item and the classes of its tail, ``[N, 1 + K_t]``."""
    by_turns = in_turns(labels, len(tail_ids))[:, :, None]
    joined = torch.cat([by_turns, tail_ids.expand(len(by_turns), -1, -1)], 2)
    return joined.flatten(0, 1)[: len(labels)]


class Logits(NamedTuple):
    """A teacher's targets for a chunk of items: all that a sample needs of the chunk, and no more.

    All else is computed once for all items: on an accelerator a launch per chunk costs more than its work.

    Attributes:
        candidates: the logits among which the m best-ranked ones of each item are.
        chosen: as :meth:`Chosen.logits` gives them; none with ``columns``.
        normaliser: of all classes, as :attr:`TeacherTargets.normaliser`.
        counted: the items that the mass of the chunk counts.
        items_per_counted: the items that each counted item stands for.
        ranked: the sampled ranks, where all C ranks are sampled from.
        columns: as :class:`Answers` has them, where a kernel computes them.
    """

    candidates: Candidates
    chosen: tuple[Tensor, ...]
    normaliser: Tensor
    counted: slice
    items_per_counted: float
    ranked: Ranked | None
    columns: Tensor | None = None

    @classmethod
    def of(cls, targets: TeacherTargets, chosen: Chosen, first_item: int, ranked: Ranked | None) -> Logits:
        """Takes what a sample needs from the targets of a chunk.

        Args:
            targets: of the chunk.
            chosen: the classes of all items.
            first_item: the number of the chunk's first item.
            ranked: the sampled ranks, where all C ranks are sampled from.
        """
        by_kernels = chosen.tail_ids.numel() and uses_triton(chosen.tail_ids.device)
        columns = targets.columns(chosen.tail_ids, chosen.labels, first_item) if by_kernels else None
        return cls(
            targets.candidates,
            () if by_kernels else chosen.logits(targets, first_item),
            targets.normaliser,
            targets.counted,
            targets.items_per_counted,
            ranked,
            columns,
        )


class Answers(NamedTuple):
    """The part of a teacher's targets that a sample is made from.

    Attributes:
        ids: the m best-ranked classes of each item, ``[N, m]``.
        log_probs: log-probabilities of these classes, ``[N, m]``.
        tail_log_probs: log-probabilities of the classes of the item's shared tail, ``[N, K_t]``.
        label_log_probs: log-probability of the label, ``[N, 1]``; None without labels.
        ranked: the sampled ranks, where all C ranks are sampled from.
        columns: all these log-probabilities side by side: of ranked classes, label and tail, or, where kernels compute
            them, of ranked classes, tail and label.
    """

    ids: Tensor
    log_probs: Tensor
    tail_log_probs: Tensor
    label_log_probs: Tensor | None
    ranked: Ranked | None
    columns: Tensor

    @classmethod
    def of(cls, parts: Sequence[Logits], num_shared: int, temperature: float) -> Answers:
        """Joins the answers to consecutive chunks of items.

        Args:
            parts: the chunks.
            num_shared: K_t.
            temperature: τ > 0.
        """
        if parts[0].columns is not None:
            ids, columns = _cat([part.candidates.places for part in parts]), _cat([part.columns for part in parts])
            ranked, tails, labels = columns.tensor_split([ids.shape[1], ids.shape[1] + num_shared], 1)
            return cls(ids, ranked, tails, labels if labels.shape[1] else None, None, columns)
        candidates, places, num_classes = zip(*(part.candidates for part in parts), strict=True)
        highest, ids = Candidates(_cat(candidates), _cat(places), num_classes[0]).ranked()
        chosen = zip(*(part.chosen for part in parts), strict=True)
        logits = torch.cat([highest, *map(_cat, chosen)], 1)
        has_label = logits.shape[1] > ids.shape[1] + num_shared
        columns = log_probs_by_parts(logits, [part.normaliser for part in parts], temperature)
        own, labels, tails = columns.tensor_split([ids.shape[1], ids.shape[1] + has_label], 1)
        ranked = [part.ranked for part in parts]
        return cls(
            ids,
            own,
            tails,
            labels if has_label else None,
            None if ranked[0] is None else _cat_ranked(ranked),
            columns,
        )

    def unranked_mass(self, mass: Tensor, parts: Sequence[Logits]) -> Tensor:
        """Takes the probability of each class out of its mass at the counted items that rank the class, ``[C]``.

        Rounding may leave a mass just below 0.

        Args:
            mass: summed over the counted items, ``[C]``.
            parts: the chunks that the answers were joined from.
        """
        if uses_triton(mass.device):
            from hf_dis.teacher.triton_normaliser import take_ranked

            mass = mass if len(parts) > 1 else mass.clone()  # the mass of a single chunk is kept by its targets
            for items_per_counted, counted in _counted(parts).items():
                for items in counted:
                    places = items.start, items.stop, items.step
                    take_ranked(mass, self.ids, self.log_probs, *places, items_per_counted)
            return mass
        for items_per_counted, counted in _counted(parts).items():
            ids, probs = (_cat([values[items] for items in counted]) for values in (self.ids, self.log_probs))
            given = ids.flatten(), probs.exp().flatten()
            add = mass.index_add_ if len(parts) > 1 else mass.index_add
            mass = add(0, *given, alpha=-items_per_counted)
        return mass


def _counted(parts: Sequence[Logits]) -> dict[float, list[slice]]:
    """The counted items of all chunks, by the items that each stands for; most chunks have the same size."""
    first_item, alike = 0, {}
    for part in parts:
        here = slice(first_item, first_item + len(part.candidates.places), part.counted.step)
        slices = alike.setdefault(part.items_per_counted, [])
        before = slices.pop() if slices else here
        follows = before.stop == here.start and before.step == here.step
        if follows and (here.start - before.start) % here.step == 0:
            slices.append(slice(before.start, here.stop, here.step))  # the same items, and nothing to join
        else:
            slices += [before, here] if before is not here else [here]
        first_item = here.stop
    return alike


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Joins tensors, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cat_ranked(parts: Sequence[Ranked]) -> Ranked:
    strata = zip(*(part.stratum for part in parts), strict=True)
    return Ranked(_cat([part.ranks for part in parts]), Stratum(*map(_cat, strata)))
