"""Comparisons of trainings that a worker has run in several processes with the same ones in one process."""

from __future__ import annotations

import pytest
import torch
from tiny_models import assert_near
from torch import Tensor


def largest(tensors: dict[str, Tensor]) -> float:
    return max(float(one.abs().max()) for one in tensors.values())


def assert_same_training(found: dict, expected: dict, steps: int, tolerance: float) -> None:
    """Compares what tensor_parallel_worker.train returns.

    Args:
        found: of a process of several.
        expected: of one process.
        steps: of the optimizer.
        tolerance: relative to the largest weight; for gradients, twice of that relative to the largest one of a step.
    """
    size = largest(expected["student"])
    assert_near(found["student"], expected["student"], tolerance * size)
    assert_near(found["saved"], expected["saved"], tolerance * size)
    assert len(found["gradients"]) == len(expected["gradients"]) == steps
    for mine, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        size = largest(theirs)
        assert size > 1e-3
        assert_near(mine, theirs, 2 * tolerance * size)  # both are rounded
    for mine, theirs in zip(found["logs"], expected["logs"], strict=True):
        for name in ("loss", "grad_norm", "kd_loss", "ce_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name  # a Trainer sums them in float32
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=max(tolerance, 1e-9))
    assert found["predictions"] == pytest.approx(expected["predictions"], abs=10 * tolerance)
    assert found["items"] == expected["items"]
    assert torch.equal(found["steps"], expected["steps"])
