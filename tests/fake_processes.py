"""A process group of one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def one_of_four(rank: int) -> Iterator[None]:
    """Joins this process to a group of four as the process ``rank``; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # It keeps meshes of the group, which are equal to those of the next one.
        _clear_sharding_prop_cache()
