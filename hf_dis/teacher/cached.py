"""Distilling from stored targets: what the sample and the losses see of a teacher that is not there.

A stored item knows m ranked classes exactly and T classes that stand for its tail; of all others it knows nothing. The
target of the loss lies on the stored classes alone, and the student's normaliser needs the student alone: so every
item computes its stored classes, for certain, and further classes are sampled for the normaliser only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_dis.errors import DataError
from hf_dis.items import Items
from hf_dis.teacher.compact import CompactTargets, TargetLayout

# Stands for the log-probability of a class about which the item has nothing stored: none, as far as float32 can tell
# beside one. A processor takes the exponential of lower ones, which are denormal or zero, ten times as long.
UNKNOWN = -80.0
# The column of a batch that holds the stored targets of its examples.
TARGETS = "teacher_targets"
# Fills up examples with fewer items than others of their batch.
FILLER = 255


class CachedTargets:
    """Stored targets of some items as columns of a sample.

    The target is unbiased over the sample that was stored. The log-probability of a stored tail class is not known:
    each carries their mean, by which the target's negative entropy is the one that was stored.

    Args:
        targets: as stored.
        num_classes: C.

    Attributes:
        ids: the stored classes, ranked ones first, then those of the tail, ``[n, m + T]``.
        used: false where a tail class repeats the one before it, ``[n, m + T]``.
        target: estimated teacher probabilities, each item sums to one, zero where not used, ``[n, m + T]``.
        log_probs: the ranked classes' log-probabilities, then the tail's mean, ``[n, m + T]``.
        depth: m.
        compact: as stored.
    """

    def __init__(self, targets: CompactTargets, num_classes: int):
        self.compact, self.num_classes, self.depth = targets, num_classes, targets.ids.shape[1]
        ranked = targets.log_probs.exp()
        tail, tail_mass = targets.stored_ids, targets.log_tail_mass[:, None].exp()
        first = torch.ones_like(tail, dtype=torch.bool)
        first[:, 1:] = tail[:, 1:] != tail[:, :-1]
        run = first.cumsum(1) - 1
        times = torch.zeros_like(tail_mass.expand(tail.shape)).scatter_add_(1, run, tail_mass.expand(tail.shape))
        tail_target = times.gather(1, run) / max(1, tail.shape[1]) * first
        target = torch.cat([ranked, tail_target], 1)
        log_probs = targets.log_probs.clamp_min(UNKNOWN)
        known = (ranked * log_probs).sum(1, keepdim=True)
        # No tail class is likelier than the last ranked one; where the tail is next to nothing, rounding may say so.
        highest = log_probs[:, -1:] if self.depth else torch.zeros_like(known)
        mean_log_prob = ((-targets.entropy[:, None] - known) / tail_mass).nan_to_num(UNKNOWN)
        mean_log_prob = torch.minimum(mean_log_prob.clamp_min(UNKNOWN), highest)
        self.ids = torch.cat([targets.ids, tail], 1)
        self.used = torch.cat([torch.ones_like(ranked, dtype=torch.bool), first], 1)
        self.target = target / target.sum(1, keepdim=True)
        self.log_probs = torch.cat([log_probs, mean_log_prob.expand(tail.shape)], 1)

    def __len__(self) -> int:
        return len(self.ids)

    def all_classes(self) -> CachedTargets:
        """What a loss on all classes needs of the teacher."""
        return self

    def thinned(self, points: Tensor) -> CachedTargets:
        """The targets with a part of the stored sample of each item.

        Args:
            points: a systematic sample of ``[0, k)`` for each item, ``[n, k]``: each stored class is kept with the
                same probability, and the kept ones are spread evenly, so the target stays unbiased.
        """
        stored = self.compact.stored_ids
        every = stored.shape[1] / points.shape[1]
        kept = (points * every).long().clamp_(max=stored.shape[1] - 1)
        return CachedTargets(
            self.compact._replace(stored_ids=stored.gather(1, kept.to(stored.device))), self.num_classes
        )

    def class_mass(self) -> Tensor:
        """An unbiased estimate of :meth:`hf_dis.teacher.targets.TeacherTargets.class_mass`, ``[C]``."""
        tail = self.target[:, self.depth :]
        return tail.new_zeros(self.num_classes).index_add_(0, self.ids[:, self.depth :].flatten(), tail.flatten())


class CachedTeacher:
    """Answers from what a cache put into the batch; stands where :class:`hf_dis.teacher.online.OnlineTeacher` does.

    Args:
        layout: of the stored targets.
        fingerprint: digest of the teacher that the cache was written with.
    """

    def __init__(self, layout: TargetLayout, fingerprint: str):
        self.layout, self.fingerprint = layout, fingerprint

    def __call__(self, inputs: Any, items: Items, check_values: bool = True) -> Iterator[CachedTargets]:
        """Yields the targets of all items as one chunk.

        Raises:
            DataError: if the batch has not come with targets, with those of other items, or with what no teacher says.
        """
        if items.targets is None:
            raise DataError(
                "the batch holds no stored targets: collate it with TeacherCache.collator(your_collator), as the "
                "trainer's own dataloader does"
            )
        check_targets(items)
        targets = unpack_targets(self.layout, items.targets, check_values)
        yield CachedTargets(targets, self.layout.num_classes)

    def all_classes(self, inputs: Any, items: Items, check_values: bool = True) -> Iterator[CachedTargets]:
        """The same: the stored classes stand for all."""
        return self(inputs, items, check_values)


def check_targets(items: Items) -> None:
    """Raises DataError if a cache's targets are not those of as many items as the batch has."""
    if len(items.targets) != len(items):
        raise DataError(
            f"the cache holds targets of {len(items.targets)} items for this batch, and {len(items)} are supervised: "
            "mask the labels as when the cache was written"
        )


def unpack_targets(layout: TargetLayout, packed: Tensor, check_values: bool) -> CompactTargets:
    """The targets of stored items, uint8 ``[n, item_bytes]``, on their device.

    Args:
        layout: of their cache.
        packed: the items.
        check_values: whether to look at them; on an accelerator this waits for the device.

    Raises:
        DataError: if they name classes that there are not, or their probabilities do not sum to one, as far as half
            precision tells.
    """
    targets = layout.unpack(packed)
    if check_values:
        mass = targets.log_probs.exp().sum(1) + targets.log_tail_mass.exp()
        is_known = torch.cat([targets.ids, targets.stored_ids], 1).lt(layout.num_classes).all(1)
        sound = is_known & ((mass - 1).abs() < 0.1) & (targets.entropy + targets.log_normaliser).isfinite()
        if not sound.all():
            raise DataError(
                f"{int((~sound).sum())} of {len(sound)} stored items are no answer about {layout.num_classes} classes: "
                "the cache was not written by hf_dis, or was altered since; write it again"
            )
    return targets


def stored_items(found: Tensor) -> Tensor:
    """The items of all examples, one after another, of what a look-up in a cache found: ``[items, bytes]``."""
    # An item ends with a float32, which is NaN where its last bytes are all ones.
    return found[(found[..., -2:] != FILLER).any(-1)]
