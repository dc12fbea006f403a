"""Sums over all classes of a head, for losses that are computed from some or all of its columns."""

from __future__ import annotations

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

    def columns(self, ids: Tensor) -> Tensor:
        """A column for each class id, some column for a class that has none here."""
        return ids

    def only_here(self, values: Tensor, ids: Tensor) -> Tensor:
        """The values of classes, zero for classes that have no column here, of the shape of the ids."""
        return values


ALL_CLASSES = Classes()
