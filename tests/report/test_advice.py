"""Advice on logged values: bad ones have advice, and those at their thresholds are not."""

import pytest

from hf_dis.report.advice import advice

GOOD = {
    "kd_loss": 0.5,
    "dis/coverage": 0.9,
    "dis/ess": 40.0,
    "dis/certain": 0.5,
    "probe/exact_kd_loss": 0.5,
    "probe/sampled_kd_loss": 0.45,
    "probe/cosine": 0.95,
    "probe/relative_error": 0.3,
}


def test_good_values_need_no_advice():
    assert advice(GOOD) == advice({}) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dis/coverage": 0.41, "probe/relative_error": 1.2}, ["coverage 0.41", "relative error 1.20"]),
        ({"dis/ess": 9.5}, ["effective sample size 9.5"]),
        ({"probe/relative_error": 1.01}, ["relative error 1.01"]),
        ({"probe/sampled_kd_loss": 0.37}, ["sampled loss 0.37"]),
        ({"probe/sampled_kd_loss": 0.63}, ["sampled loss 0.63"]),
        ({"kd_loss": -0.01}, ["below zero"]),
        ({"loss": float("nan")}, ["loss is nan: training has diverged"]),
    ],
    ids=["coverage", "ess", "gradient", "loss too low", "loss too high", "negative", "diverged"],
)
def test_bad_values_are_told(values, said):
    told = advice(GOOD | values)
    assert len(told) == len(said)
    assert all(text in line for text, line in zip(said, told, strict=True))


@pytest.mark.parametrize(
    "values",
    [
        {"dis/coverage": 0.5},
        {"dis/coverage": 0.1},  # with a good gradient
        {"dis/ess": 10.0},
        {"probe/relative_error": 1.0},
        {"probe/sampled_kd_loss": 0.375},
    ],
    ids=["coverage", "coverage, good gradient", "ess", "gradient", "loss"],
)
def test_values_at_their_thresholds_are_not_told(values):
    assert advice(GOOD | values) == []


def test_values_that_are_not_numbers_are_not_judged():
    assert advice({"kd_loss": [1.0], "dis/ess": "small", "dis/coverage": None, "probe/relative_error": {}}) == []


def test_coverage_that_nothing_was_compared_with_asks_for_a_probe():
    (line,) = advice({"dis/coverage": 0.41, "dis/certain": 0.5})
    assert "num_shared_classes" in line and "probe_steps" in line
    (line,) = advice({"dis/coverage": 0.41, "dis/certain": 0.95})
    assert "Raise num_sampled_classes;" in line
    (line,) = advice({"dis/coverage": 0.41, "dis/certain": 1.0})  # K = m: the error is the tail's
    assert "Raise num_shared_classes" in line


def test_the_estimated_error_is_judged_where_there_is_no_probe():
    (line,) = advice({"dis/gradient_error": 1.5})
    assert line.startswith("relative error 1.50 of the gradient: the error is larger than")
    assert advice({"dis/gradient_error": 1.5, "probe/relative_error": 0.5, "probe/cosine": 0.9}) == []
