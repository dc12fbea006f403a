"""Checks of arguments: what was given, what it has to be, what to do."""

from __future__ import annotations

from numbers import Integral, Real


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}: it has to be {expected}")


def require_number(name: str, value: object, kind: type[int] | type[float]) -> None:
    """Raises TypeError unless the value is a whole number (kind ``int``), or any number (kind ``float``)."""
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number:
        expected = "a whole number" if kind is int else "a number"
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: it has to be {expected}")
