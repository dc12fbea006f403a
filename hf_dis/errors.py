"""What the data sets raise when they are given something they cannot use."""

from __future__ import annotations


class DataError(ValueError):
    """A file, folder or setting of a data set is unusable; the message says which, why, and what to do."""
