"""Comparisons of trainings that a worker has run in several processes with the same ones in one process."""

from __future__ import annotations

import pytest
import torch
from tiny_models import assert_near
from torch import Tensor

# The output head, or the embedding to which the head is tied.
HEADS = ("classifier", "lm_head", "model.embed_tokens")


def largest(tensors: dict[str, Tensor]) -> float:
    return max(float(one.abs().max()) for one in tensors.values())


def assert_near_by_norm(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compares all tensors together, and those of the output head; some gradients of the body are rounding alone."""
    assert found.keys() == expected.keys()
    heads = [name for name in expected if name.startswith(HEADS)]
    for names in (expected.keys(), heads):
        mine, theirs = (torch.cat([one[name].flatten() for name in names]).double() for one in (found, expected))
        assert (mine - theirs).norm() <= tolerance * theirs.norm(), names


def assert_same_training(found: dict, expected: dict, steps: int, tolerance: float) -> None:
    """Compares what tensor_parallel_worker.train returns.

    Args:
        found: of a process of several.
        expected: of one process.
        steps: of the optimizer.
        tolerance: relative to the largest weight; for gradients, relative to the norm of those of a step.
    """
    size = largest(expected["student"])
    assert_near(found["student"], expected["student"], tolerance * size)
    assert_near(found["saved"], expected["saved"], tolerance * size)
    assert len(found["gradients"]) == len(expected["gradients"]) == steps
    for mine, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest(theirs) > 1e-3
        assert_near_by_norm(mine, theirs, tolerance)
    for mine, theirs in zip(found["logs"], expected["logs"], strict=True):
        for name in ("loss", "grad_norm", "kd_loss", "ce_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name  # a Trainer sums them in float32
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=max(tolerance, 1e-9))
    assert found["predictions"] == pytest.approx(expected["predictions"], abs=10 * tolerance)
    assert found["items"] == expected["items"]
    assert torch.equal(found["steps"], expected["steps"])
