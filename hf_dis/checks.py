"""Checks of arguments; each error gives the value and the expectation."""

from __future__ import annotations

from numbers import Integral, Real


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Checks a condition on an argument.

    Args:
        holds: the condition.
        name: of the argument.
        value: of the argument.
        expected: the values that are allowed, and a usual one or the remedy.

    Raises:
        ValueError: unless ``holds``.
    """
    if not holds:
        raise ValueError(f"{name} is {value!r}: it has to be {expected}")


def require_number(name: str, value: object, kind: type[int] | type[float]) -> None:
    """Checks that an argument is a number.

    Args:
        name: of the argument.
        value: of the argument.
        kind: ``int`` for whole numbers, ``float`` for any number.

    Raises:
        TypeError: if the value has a different type; a bool is not a number.
    """
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number:
        expected = "a whole number" if kind is int else "a number"
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: it has to be {expected}")
