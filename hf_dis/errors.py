"""The error that datasets and teacher caches raise, and the cause that its message quotes."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, without its full stop, for a message that quotes it."""
    return str(error).strip().partition("\n")[0].rstrip(".")


class DataError(ValueError):
    """Raised if a file, folder or setting of a dataset or cache is unusable; the message has cause and remedy."""
