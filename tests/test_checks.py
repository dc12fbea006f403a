"""Checks of arguments: the value, the expectation, the remedy."""

import numpy as np
import pytest

from hf_dis.checks import require, require_number


def test_a_condition_that_holds_is_no_error():
    require(True, "depth", -1, "0 or more")


def test_the_value_and_the_expectation_are_named():
    with pytest.raises(ValueError, match=r"^depth is -1: it has to be 0 or more$"):
        require(False, "depth", -1, "0 or more")


@pytest.mark.parametrize("value", [3, np.int64(3)])
@pytest.mark.parametrize("kind", [int, float])
def test_whole_numbers_are_numbers(value, kind):
    require_number("depth", value, kind)


@pytest.mark.parametrize(("value", "kind"), [(True, int), (True, float), ("3", float), (None, int), (0.5, int)])
def test_other_types_are_refused(value, kind):
    expected = "a whole number" if kind is int else "a number"
    with pytest.raises(TypeError, match=rf"^depth is {value!r}, a {type(value).__name__}: it has to be {expected}$"):
        require_number("depth", value, kind)
