"""The error that datasets and teacher caches raise."""

from __future__ import annotations


class DataError(ValueError):
    """Tells that a file, folder or setting of a dataset or cache is unusable; the message gives cause and remedy."""
