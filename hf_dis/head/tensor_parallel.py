"""Models that tensor parallelism spreads over processes, as transformers loads them with a ``tp_plan``.

All processes of the group have the same items. The rows of an output head are a DTensor, ``Shard(0)``, and each
process computes the columns of its own rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hf_dis.arguments import DISArguments
from hf_dis.head.sharded import sharded_heads
from hf_dis.head.spread_rows import sparse_leaf
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.models.spread import TENSOR_PARALLEL, is_spread_by_rows, rows_of_group, tensor_parallel_mesh


class OwnRows(NamedTuple):
    """The rows of a head that this process holds.

    Attributes:
        weight: ``[S, d]``.
        bias: ``[S]`` or None.
        shard: the classes of the rows.
    """

    weight: Tensor
    bias: Tensor | None
    shard: VocabShard


def is_tensor_parallel(model: nn.Module) -> bool:
    """Returns True if transformers spread a model over processes by a ``tp_plan``."""
    return tensor_parallel_mesh(model) is not None


def own_shard(layer: nn.Linear | nn.Embedding) -> VocabShard | None:
    """Returns the classes of a tensor-parallel layer that this process holds; None if the weight is whole here.

    Args:
        layer: an output head, or an embedding of the same weight.

    Raises:
        ValueError: if this process holds no row.
    """
    weight = layer.weight
    if not is_spread_by_rows(weight):
        return None
    group = weight.device_mesh.get_group(TENSOR_PARALLEL)
    # Shard(0) cuts rows as torch.chunk does: the last parts may be shorter.
    size = -(-len(weight) // dist.get_world_size(group))
    start = min(len(weight), size * dist.get_rank(group))
    return VocabShard(start, min(len(weight), start + size), group)


def own_rows(layer: nn.Linear, row_sparse: bool = False) -> OwnRows | None:
    """Returns the rows of a tensor-parallel layer that this process holds; None if the weight is whole here.

    Gradients of the rows become gradients of the layer's parameters. Rows that FSDP spread once more are gathered,
    unless the layer runs and has them already.

    Args:
        layer: an output head. A bias is spread as the weight is.
        row_sparse: give the parameters gradients as :func:`hf_dis.head.spread_rows.sparse_leaf` does. FSDP must not
            have spread the rows once more.

    Raises:
        ValueError: if this process holds no row.
    """
    shard, rows_of = own_shard(layer), sparse_leaf if row_sparse else rows_of_group
    if shard is None:
        return None
    return OwnRows(rows_of(layer.weight), None if layer.bias is None else rows_of(layer.bias), shard)


def sparse_embedding(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """Computes the output of an embedding whose rows are spread, and gives its weight a row-sparse gradient.

    Every process of the group has to call this with the same ids, and to run its backward.

    Args:
        embedding: that shares the weight of a tensor-parallel head.
        ids: of tokens, ``[...]``.
    """
    shard, rows = own_shard(embedding), sparse_leaf(embedding.weight)
    places = ids.flatten() - shard.start
    own = ((places >= 0) & (places < len(shard))).nonzero()[:, 0]
    padding = -1 if embedding.padding_idx is None else embedding.padding_idx - shard.start
    given = places[own], rows, padding if 0 <= padding < len(shard) else None
    found = rows.new_zeros(len(places), rows.shape[1]).index_copy(0, own, F.embedding(*given, sparse=True))
    return shard.joined(found).view(*ids.shape, -1)


def check_same_sample(item_ids: Tensor, tail_ids: Tensor, group: dist.ProcessGroup) -> None:
    """Checks that processes have sampled the same classes; every process of the group has to call it.

    Args:
        item_ids, tail_ids: class ids, ``[N, R]`` and ``[G, K_t]``.
        group: the processes.

    Raises:
        ValueError: if numbers of items or classes differ.
    """
    columns = torch.arange(1, 1 + item_ids.shape[1], device=item_ids.device)
    items = torch.arange(1, 1 + len(item_ids), device=item_ids.device)
    # Sums of integers that wrap around, so that any two samples are very likely to have different ones.
    own = torch.stack([((item_ids * columns).sum(1) * items).sum(), tail_ids.sum(), columns.new_tensor(len(item_ids))])
    everyones = VocabShard(0, 1, group).gather(own).cpu()
    if bool((everyones != everyones[0]).any()):
        raise ValueError(
            f"the processes that hold a student have {everyones[:, -1].tolist()} items, or different classes. Give "
            "all of them the same batches in the same order, the same seed, and the same teacher"
        )


def check_tensor_parallel(
    student: nn.Module, teacher: nn.Module | None, names: tuple[str, ...], arguments: DISArguments, mode: str
) -> None:
    """Checks that a tensor-parallel student can be trained; any other student passes.

    Args:
        student: the model that is trained.
        teacher: its teacher, or None.
        names: the linear layers of its output head.
        arguments: the settings of the method.
        mode: ``"sampled"`` or ``"exact"``.

    Raises:
        ValueError: if processes of the run hold nothing of the student, the head is made of several layers, a
            setting needs whole rows, or the teacher is spread in another way.
    """
    mesh = tensor_parallel_mesh(student)
    if mesh is None:
        if teacher is not None and is_tensor_parallel(teacher):
            raise ValueError(
                "the teacher is tensor-parallel and the student is not: the processes have different batches, and "
                "such a teacher answers about one batch. Load both with DistributedConfig(tp_size=...), load the "
                "teacher whole, or train from a cache of its targets"
            )
        return
    if teacher is not None and sharded_heads(teacher):
        raise ValueError(
            "the student is tensor-parallel, and the head of the teacher is a ShardedHead: load the teacher with "
            "DistributedConfig(tp_size=...) too, or whole, or train from a cache of its targets"
        )
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the student is spread over {mesh.size()} processes, and the run has {dist.get_world_size()}: load it "
            "with a DistributedConfig whose tp_size * dp_replicate_size * fsdp_size is the number of processes"
        )
    _check_same_group(mesh, None if teacher is None else tensor_parallel_mesh(teacher))
    if mode == "sampled" and len(names) > 1:
        raise ValueError(
            f"the output head is made of {' and '.join(names)}, and the student is tensor-parallel: a "
            "tensor-parallel head has to be one layer; leave the head out of the adapters"
        )
    if arguments.row_sparse_head and mesh.ndim > 1:
        raise ValueError(
            f"row_sparse_head is set, and the run has {mesh.size()} processes for a student that is spread over "
            f"{mesh.get_group(TENSOR_PARALLEL).size()}: FSDP2 averages dense gradients of the copies alone. Set "
            "row_sparse_head=False, or load the student with tp_size alone, the number of processes"
        )
    if arguments.probe_steps:
        raise ValueError(
            f"probe_steps is {arguments.probe_steps}, and the student is tensor-parallel: the probe takes the "
            "exact gradient of a whole head; set probe_steps to 0"
        )


def _check_same_group(student: DeviceMesh, teacher: DeviceMesh | None) -> None:
    """Checks that the classes of a teacher are spread over the same processes as those of its student."""
    if teacher is None:
        return
    mine, theirs = (dist.get_process_group_ranks(mesh.get_group(TENSOR_PARALLEL)) for mesh in (student, teacher))
    if mine != theirs:
        raise ValueError(
            f"process {dist.get_rank()} holds the student together with the processes {mine}, and the teacher with "
            f"{theirs}, which have other items: load both with the same DistributedConfig, or load the teacher whole"
        )
