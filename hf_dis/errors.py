"""The error that datasets and teacher caches raise."""

from __future__ import annotations


class DataError(ValueError):
    """Raised if a file, folder or setting of a dataset or cache is unusable; the message has cause and remedy."""
