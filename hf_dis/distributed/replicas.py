"""Data parallelism beside tensor parallelism: copies of a model, each of them spread over several processes."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from hf_dis.distributed.sums import sum_over_processes
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.models.spread import TENSOR_PARALLEL, tensor_parallel_mesh


class Replicas(NamedTuple):
    """The copies of a tensor-parallel model. The processes of a copy have the same items; copies differ in theirs.

    Attributes:
        group: the processes that hold the copy of this process.
        index: the number of that copy, from 0 on.
        number: of copies.
        across: the processes that hold the same part of each copy, a group for each dimension of data parallelism.
    """

    group: dist.ProcessGroup
    index: int
    number: int
    across: tuple[dist.ProcessGroup, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Replicas | None:
        """Finds the copies of a model; None if it is not tensor-parallel.

        Args:
            model: as transformers loads it with a ``DistributedConfig``.
        """
        mesh = tensor_parallel_mesh(model)
        if mesh is None:
            return None
        index, number, across = 0, 1, []
        for dimension, name in enumerate(mesh.mesh_dim_names):
            if name != TENSOR_PARALLEL:
                index = index * mesh.size(dimension) + mesh.get_local_rank(dimension)
                number *= mesh.size(dimension)
                across.append(mesh.get_group(dimension))
        return cls(mesh.get_group(TENSOR_PARALLEL), index, number, tuple(across))

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums tensors over the copies, as :func:`hf_dis.distributed.sum_over_processes`; each copy counts once."""
        for group in self.across:
            tensors = sum_over_processes(tensors, group)
        return tensors

    def gather(self, values: Tensor) -> Tensor:
        """Joins the values ``[n, ...]`` of the copies in their order, ``[number * n, ...]``."""
        for group in reversed(self.across):
            values = VocabShard(0, 1, group).gather(values).flatten(0, 1)
        return values
