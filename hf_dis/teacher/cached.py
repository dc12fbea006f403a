"""Stored teacher targets: CachedTargets and CachedTeacher stand in for a teacher that is not loaded.

A stored item has m ranked classes exactly, and T classes that stand for its tail. Nothing is stored of all other
classes. The target of the loss lies on the stored classes alone, and the student's normaliser needs the student alone.
So every item computes all its stored classes, and further classes are sampled for the normaliser only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_dis.errors import DataError
from hf_dis.items import Items, check_stored_number
from hf_dis.kernels import uses_triton
from hf_dis.teacher.compact import CompactTargets, TargetLayout

# The log-probability of a class of which nothing is stored: its probability vanishes beside one in float32.
# Exponentials of lower numbers are denormal or zero, which takes a processor ten times as long.
UNKNOWN = -80.0
# The column of a batch that holds the stored targets of its examples.
TARGETS = "teacher_targets"


class CachedTargets:
    """Prepares stored targets as columns of a sample.

    The target is unbiased over the stored sample. The log-probability of a single tail class is unknown. Every tail
    class carries the mean of the tail, with which the target's entropy is the stored entropy.

    Args:
        targets: as stored.
        num_classes: C.

    Attributes:
        ids: the stored classes, ranked ones first, then the tail's, ``[n, m + T]``.
        used: false where a tail class repeats another column of the item, ``[n, m + T]``.
        target: estimated teacher probabilities, ``[n, m + T]``. Each item sums to one; zero where not used, and in a
            tail without mass.
        log_probs: log-probabilities of the ranked classes, then the mean of the tail, ``[n, m + T]``.
        depth: m.
        compact, num_classes: as given.
    """

    def __init__(self, targets: CompactTargets, num_classes: int):
        self.compact, self.num_classes, self.depth = targets, num_classes, targets.ids.shape[1]
        if uses_triton(targets.ids.device):
            from hf_dis.teacher.triton_stored import stored_columns

            self.ids, self.used, self.target, self.log_probs = stored_columns(*targets[:5], UNKNOWN)
            return
        ranked = targets.log_probs.exp()
        tail, tail_mass = targets.stored_ids, targets.log_tail_mass[:, None].exp()
        first = torch.ones_like(tail, dtype=torch.bool)
        first[:, 1:] = tail[:, 1:] != tail[:, :-1]
        run = first.cumsum(1) - 1
        first &= ~_are_ranked(tail, targets.ids)
        times = torch.zeros_like(tail_mass.expand(tail.shape)).scatter_add_(1, run, tail_mass.expand(tail.shape))
        tail_target = times.gather(1, run) / max(1, tail.shape[1]) * first
        target = torch.cat([ranked, tail_target], 1)
        log_probs = targets.log_probs.clamp_min(UNKNOWN)
        known = (ranked * log_probs).sum(1, keepdim=True)
        # No tail class is likelier than the last ranked one; with a tiny tail the rounded quotient may exceed it.
        highest = log_probs[:, -1:] if self.depth else torch.zeros_like(known)
        mean_log_prob = ((-targets.entropy[:, None] - known) / tail_mass).clamp_min(UNKNOWN)
        mean_log_prob = torch.minimum(mean_log_prob, highest).masked_fill(tail_mass == 0, UNKNOWN)
        self.ids = torch.cat([targets.ids, tail], 1)
        self.used = torch.cat([torch.ones_like(ranked, dtype=torch.bool), first], 1)
        self.target = target / target.sum(1, keepdim=True)
        self.log_probs = torch.cat([log_probs, mean_log_prob.expand(tail.shape)], 1)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def cat(cls, parts: Sequence[CachedTargets]) -> CachedTargets:
        """Joins the targets of consecutive items."""
        if len(parts) == 1:
            return parts[0]
        joined = zip(*(part.compact for part in parts), strict=True)
        return cls(CompactTargets(*map(torch.cat, joined)), parts[0].num_classes)

    def all_classes(self) -> CachedTargets:
        """Returns the teacher's targets for a loss on all classes: the stored classes stand for all."""
        return self

    def thinned(self, points: Tensor) -> CachedTargets:
        """Keeps a part of the stored sample of each item; the target stays unbiased.

        Args:
            points: a systematic sample of ``[0, k)`` for each item, ``[n, k]``. Each stored class is kept with the
                same probability, and the kept classes are spread evenly.
        """
        stored = self.compact.stored_ids
        every = stored.shape[1] / points.shape[1]
        kept = (points * every).long().clamp_(max=stored.shape[1] - 1)
        return CachedTargets(
            self.compact._replace(stored_ids=stored.gather(1, kept.to(stored.device))), self.num_classes
        )

    def class_mass(self, is_sparse: bool = False) -> Tensor:
        """Estimates :meth:`hf_dis.teacher.targets.TeacherTargets.class_mass` without bias, ``[C]``.

        Args:
            is_sparse: return a sparse tensor, which is not coalesced.
        """
        ids, tail = self.compact.stored_ids.flatten(), self.target[:, self.depth :].flatten()
        if is_sparse:
            return torch.sparse_coo_tensor(ids[None], tail, (self.num_classes,), check_invariants=False)
        return tail.new_zeros(self.num_classes).index_add_(0, ids, tail)


class CachedTeacher:
    """Answers with the targets that a cache put into the batch, in place of an online teacher.

    The interface is that of :class:`hf_dis.teacher.online.OnlineTeacher`.

    Args:
        layout: of the stored targets.
        fingerprint: digest of the teacher that the cache was written with.
    """

    def __init__(self, layout: TargetLayout, fingerprint: str):
        self.layout, self.fingerprint = layout, fingerprint

    def __call__(self, inputs: Any, items: Items, check_values: bool = True) -> Iterator[CachedTargets]:
        """Yields the targets of all items as one chunk.

        Args:
            inputs: not read.
            items: of the batch, with their stored targets.
            check_values: look into the targets; on an accelerator this waits for the device.

        Raises:
            DataError: if the batch has no targets, or targets of a different number of items, or unsound targets.
        """
        if items.targets is None:
            raise DataError(
                "the batch holds no stored targets: collate it with TeacherCache.collator(your_collator), as the "
                "trainer's own dataloader does"
            )
        check_stored_number(len(items.targets), len(items))
        targets = unpack_targets(self.layout, items.targets, check_values)
        yield CachedTargets(targets, self.layout.num_classes)

    def all_classes(self, inputs: Any, items: Items, check_values: bool = True) -> Iterator[CachedTargets]:
        """Yields the same: the stored classes stand for all classes."""
        return self(inputs, items, check_values)


def unpack_targets(layout: TargetLayout, packed: Tensor, check_values: bool) -> CompactTargets:
    """Unpacks stored items, on their device.

    Args:
        layout: of the cache.
        packed: the items, uint8 ``[n, item_bytes]``.
        check_values: look into the targets; on an accelerator this waits for the device.

    Raises:
        DataError: if class ids are outside 0..C-1, or probabilities do not sum to one to half precision.
    """
    targets = layout.unpack(packed)
    if check_values:
        mass = targets.log_probs.exp().sum(1) + targets.log_tail_mass.exp()
        in_range = torch.cat([targets.ids, targets.stored_ids], 1).lt(layout.num_classes).all(1)
        sound = in_range & ((mass - 1).abs() < 0.1) & (targets.entropy + targets.log_normaliser).isfinite()
        if not sound.all():
            raise DataError(
                f"{int((~sound).sum())} of {len(sound)} stored items do not fit {layout.num_classes} "
                "classes: class ids have to be below that, and probabilities have to sum to one. The cache was not "
                "written by hf_dis, or was altered since; write it again"
            )
    return targets


def _are_ranked(ids: Tensor, ranked: Tensor) -> Tensor:
    """Marks the ids, ``[n, T]``, that are among the ranked classes of their item, ``[n, m]``: bool, ``[n, T]``."""
    if not ranked.shape[1]:
        return torch.zeros_like(ids, dtype=torch.bool)
    in_order = ranked.sort(1).values
    place = torch.searchsorted(in_order, ids.contiguous()).clamp_(max=ranked.shape[1] - 1)
    return in_order.gather(1, place) == ids
