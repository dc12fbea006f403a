"""A process group of one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def one_of_four(rank: int) -> Iterator[None]:
    """Joins this process to a group of four as the process ``rank``; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        yield
    finally:
        dist.destroy_process_group()
