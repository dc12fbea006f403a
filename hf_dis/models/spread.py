"""Parameters that transformers spreads over processes."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Shard


def is_spread_by_rows(value: torch.Tensor) -> bool:
    """Returns True for a parameter whose rows transformers spread over processes by a ``tp_plan``."""
    return (
        isinstance(value, DTensor) and value.device_mesh.mesh_dim_names == ("tp",) and value.placements == (Shard(0),)
    )
