"""The floating-point types that a device can compute in."""

from __future__ import annotations

import torch

# Types of devices that compute in float32 at most.
WITHOUT_FLOAT64 = frozenset({"mps"})


def widest(device: torch.device | str) -> torch.dtype:
    """The widest floating-point type of a device: float64, or float32 on a device without float64."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64
