"""The ranked classes of a teacher's logits, found in groups of classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Classes per group in top_ranked: the highest logit of a group shows whether the group can hold a best-ranked class.
GROUP = 8


def top_ranked(logits: Tensor, depth: int, highest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Finds the highest logits of each item and their classes, best first: as ``topk``, and several times faster.

    The m highest logits lie in the m groups with the highest maxima.

    Args:
        logits: ``[n, C]``.
        depth: m, at most C.
        highest: the m groups with the highest maxima, of ``num_groups(C, m)``, in any order, ``[n, m]``; found here if
            None.

    Returns:
        logits and class ids, ``[n, m]`` each.
    """
    if not num_groups(logits.shape[1], depth):
        return logits.topk(depth, dim=1)
    if highest is None:
        highest = best_groups(logits, depth)[1]
    return ranked_members(group_members(logits, highest), highest, logits.shape[1])


def best_groups(logits: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Finds the groups of classes with the highest maxima, best first: maxima and groups, ``[n, m]`` each."""
    groups = num_groups(logits.shape[1], depth)
    # Maxima are taken between contiguous stretches of memory.
    return logits[:, : groups * GROUP].unflatten(1, (GROUP, groups)).amax(1).topk(depth, dim=1)


def group_members(logits: Tensor, best: Tensor) -> Tensor:
    """Selects the logits of the classes of m groups, and of those in no group: ``[n, GROUP·m + left over]``."""
    groups = logits.shape[1] // GROUP
    grouped, left_over = logits.tensor_split([groups * GROUP], 1)
    members = grouped.unflatten(1, (GROUP, groups)).gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)
    return torch.cat([members, left_over], 1) if left_over.shape[1] else members


def ranked_members(members: Tensor, best: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Ranks the logits that :func:`group_members` selects.

    Args:
        members: as :func:`group_members` returns them.
        best: the groups, ``[n, m]``.
        num_classes: C.

    Returns:
        the highest logits and their class ids, ``[n, m]`` each.
    """
    groups = num_classes // GROUP
    top, places = members.topk(best.shape[1], dim=1)
    ids = (best[:, None] + torch.arange(0, groups * GROUP, groups, device=best.device)[:, None]).flatten(1)
    if num_classes > groups * GROUP:
        left_over = torch.arange(groups * GROUP, num_classes, device=best.device)
        ids = torch.cat([ids, left_over.expand(len(ids), -1)], 1)
    return top, ids.gather(1, places)


def num_groups(num_classes: int, depth: int) -> int:
    """Counts the groups G of :data:`GROUP` classes that a ranking looks at first; 0: it looks at all classes.

    Class c is in group c mod G. The classes from ``GROUP · G`` on are in none.
    """
    groups = num_classes // GROUP
    return groups if groups >= 2 * depth else 0


class Candidates(NamedTuple):
    """Logits among which an item's m best-ranked classes are: ranked, or those of the m best groups.

    Attributes:
        logits: ``[n, m]``, or ``[n, M]`` as :func:`group_members` selects them.
        places: the classes, or the groups, ``[n, m]``.
        num_classes: C.
    """

    logits: Tensor
    places: Tensor
    num_classes: int

    def ranked(self) -> tuple[Tensor, Tensor]:
        """The highest logits and their class ids, best first, ``[n, m]`` each."""
        if self.logits.shape == self.places.shape:
            return self.logits, self.places
        return ranked_members(*self)
