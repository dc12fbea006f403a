"""Sums over all classes of a head, for losses that are computed from some or all of its columns."""

from __future__ import annotations

import torch
from torch import Tensor


class Classes:
    """Sums over the columns that stand for all classes.

    A subclass sums over the processes that hold parts of the classes.
    """

    def log_softmax(self, values: Tensor) -> Tensor:
        """The log-softmax over all classes, ``[n, S]`` for ``[n, S]``."""
        return values.log_softmax(1)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all classes, ``[n]`` for ``[n, S]``."""
        return values.sum(1)

    def here(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of classes, and a mask of the classes that have a column here, of the shape of the ids."""
        return ids, torch.ones_like(ids, dtype=torch.bool)


ALL_CLASSES = Classes()
