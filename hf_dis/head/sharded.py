"""ShardedHead: an output head whose rows are spread over the processes of a run, for more classes than one can hold.

Each process trains on items of its own, and holds C / P rows of the head with their gradients and moments. In a step
the features of all processes are gathered, and each process computes the logits of its classes. The logits of an item
go to the process of the item (arXiv 2010.05222). With sampled classes nothing that is sent grows with C.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hf_dis.head.gathered_items import filled, logits_of_all_items
from hf_dis.head.processes import check_processes, only_saved_whole
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.precision import product_type
from hf_dis.sampling.designs import Updates

# Rows that are initialised from one state of a generator, so that all numbers of processes start from the same head.
BLOCK_ROWS = 2**14
# Logits that exist at a time where classes are ranked.
TILE_ELEMENTS = 2**24


class ShardedHead(nn.Linear):
    """Holds the rows of some classes of ``h Wᵀ + b``, and takes the place of an ``nn.Linear`` of all classes.

    The forward computes the logits of all C classes for the items of this process, ``[..., C]``. Every process of the
    group has to call it, and to run its backward; the numbers of items may differ, and may be zero. The gradient of a
    row is divided by the number of processes: it is the mean over processes that ``DistributedDataParallel`` computes
    of all other parameters.

    Args:
        in_features: d.
        num_classes: C, at least the number of processes.
        bias: add a bias.
        mesh: the processes that hold the head, one-dimensional, which have to be all processes of the run; None: the
            same.
        device: of the rows.
        dtype: of the rows.
        seed: of the initial rows, the same on every process. The rows do not depend on the number of processes.

    Attributes:
        weight: the rows of this process, ``[stop - start, d]``.
        bias: the entries of this process, ``[stop - start]``, or None.
        out_features: C.
        shard: the classes of this process.

    Raises:
        ValueError: if there are fewer classes than processes, or the mesh does not hold the processes of the run.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ):
        check_processes(mesh)
        group = None if mesh is None else mesh.get_group()
        number = dist.get_world_size(group) if dist.is_initialized() else 1
        if num_classes < number:
            raise ValueError(
                f"a head of {num_classes} classes is to be spread over {number} processes: each needs a class; start "
                f"{num_classes} processes or fewer, or leave the head whole"
            )
        bounds = shard_bounds(num_classes, number)
        index = dist.get_rank(group) if number > 1 else 0
        start, stop = bounds[index : index + 2]
        super().__init__(in_features, stop - start, bias, device="meta", dtype=dtype)
        self.out_features, self.shard, self._bounds = num_classes, VocabShard(start, stop, group), bounds
        self.to_empty(device=device or "cpu")
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int, std: float | None = None) -> None:
        """Sets the rows at random, by class: the same rows for every number of processes.

        Args:
            seed: of the rows.
            std: standard deviation of the weights, and no bias; None: uniform, as ``nn.Linear`` has both.
        """
        bound = 1 / math.sqrt(self.in_features)
        first_block, last_block = self.shard.start // BLOCK_ROWS, (self.shard.stop - 1) // BLOCK_ROWS
        for block in range(first_block, last_block + 1):
            generator = torch.Generator().manual_seed((seed << 32) + block)
            size = min(BLOCK_ROWS, self.out_features - block * BLOCK_ROWS)
            rows = torch.empty(size, self.in_features + 1)
            if std is None:
                rows.uniform_(-bound, bound, generator=generator)
            else:
                rows.normal_(std=std, generator=generator)
                rows[:, -1] = 0
            self.copy_rows(rows[:, :-1], rows[:, -1], block * BLOCK_ROWS)

    @torch.no_grad()
    def copy_rows(self, weight: Tensor, bias: Tensor | None, first: int = 0) -> None:
        """Takes over those rows of consecutive classes that this process holds.

        Args:
            weight, bias: of the classes, ``[n, d]`` and ``[n]``, or None where the head has no bias.
            first: the first of the classes.
        """
        start, stop = max(self.shard.start, first), min(self.shard.stop, first + len(weight))
        if start >= stop:
            return
        own, given = slice(start - self.shard.start, stop - self.shard.start), slice(start - first, stop - first)
        self.weight[own] = weight[given].to(self.weight)
        if self.bias is not None:
            self.bias[own] = bias[given].to(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Computes the logits of all classes, ``[..., C]`` for ``[..., d]``; sends them, so costs grow with C."""
        leading, flat = features.shape[:-1], features.flatten(0, -2).to(product_type(features))
        own = self.weight, self.bias
        weight, bias = (None if one is None else _Divided.apply(one, self.shard.number) for one in own)
        numbers = self.numbers(len(flat))
        everyones = self.shard.gathered(filled(flat, max(numbers)))
        logits = F.linear(everyones, weight, bias)
        return self.shard.side_by_side(logits, self.sizes)[: len(flat)].unflatten(0, leading)

    def sampled(
        self,
        features: Tensor,
        item_ids: Tensor,
        tail_ids: Tensor,
        row_sparse: bool = False,
        updates: Updates | None = None,
    ) -> Tensor:
        """Computes the logits of sampled classes for the items of this process, ``[N, R + K_t]``.

        Every process of the group has to call this, with as many columns and tails, and to run its backward.

        Args:
            features: the head's input for the items of this process, ``[N, d]``.
            item_ids, tail_ids, row_sparse, updates: as for :func:`hf_dis.head.sampled_linear.sampled_logits`.
        """
        features = features.to(product_type(features))
        numbers, numbers_updated = self.numbers(len(features), 0 if updates is None else updates.number)
        if updates is not None:
            updates = updates._replace(number=sum(numbers_updated))
        given = features, self.weight, self.bias, item_ids, tail_ids, self.shard, numbers
        return logits_of_all_items(*given, row_sparse, updates)

    @torch.no_grad()
    def top_k(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Finds the k best-ranked classes of the items of this process; each process ranks its own classes first.

        Every process of the group has to call this. No ``[N, C]`` logits exist, and what is sent does not grow with C.

        Args:
            features: the head's input, ``[N, d]``.
            k: at most C.

        Returns:
            logits and class ids, best first, ``[N, k]`` each.

        Raises:
            ValueError: if k is not in 1..C.
        """
        if not 1 <= k <= self.out_features:
            raise ValueError(f"k is {k}, and the head has {self.out_features} classes: it has to be in 1..C")
        shard, most, width = self.shard, max(self.numbers(len(features))), min(k, len(self.weight))
        everyones, found = filled(features.to(self.weight.dtype), most), []
        for chunk in everyones.split(max(1, TILE_ELEMENTS // self.out_features)):
            best = F.linear(shard.gather(chunk), self.weight, self.bias).topk(width)
            missing = 0, k - width
            logits = F.pad(best.values, missing, value=-torch.inf)
            ids = F.pad(best.indices + shard.start, missing, value=-1)
            if shard.number > 1:
                logits, ids = (shard.exchange(one.flatten()).view(one.shape) for one in (logits, ids))
            logits, ids = (one.transpose(0, 1).flatten(1) for one in (logits, ids))
            logits, places = logits.topk(k)
            found.append((logits, ids.gather(1, places)))
        logits, ids = map(torch.cat, zip(*found, strict=True))
        return logits[: len(features)], ids[: len(features)]

    def extra_repr(self) -> str:
        """Describes the head, and the classes of this process."""
        return f"{super().extra_repr()}, classes {self.shard.start}..{self.shard.stop - 1} here"

    @property
    def sizes(self) -> list[int]:
        """The number of classes of each process."""
        return [stop - start for start, stop in zip(self._bounds, self._bounds[1:], strict=False)]

    def numbers(self, *numbers: int) -> list[Any]:
        """Gathers numbers of all processes: a list, or a list for each where several are given."""
        given = torch.tensor(numbers, device=self.weight.device)
        found = self.shard.gather(given).T.tolist()
        return found[0] if len(numbers) == 1 else found


class _Divided(torch.autograd.Function):
    """Values as they are, with their gradient divided."""

    @staticmethod
    def forward(ctx, values, divisor):
        ctx.divisor = divisor
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.divisor, None


def shard_bounds(num_classes: int, number: int) -> list[int]:
    """The first class of each shard and the number of all classes: sizes differ by one at most, ``[P + 1]``."""
    return [num_classes * index // number for index in range(number + 1)]


def shard_head(
    model: nn.Module,
    name: str,
    mesh: DeviceMesh | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> ShardedHead:
    """Puts a :class:`ShardedHead` in the place of a classifier's output head; call it on every process.

    A head that is in memory hands its rows over. To make a head that fits no process, build the model with two classes
    and give ``num_classes``, or build it with its head on the meta device.

    Args:
        model: the student, on every process, not wrapped. ``DistributedDataParallel`` will leave the head out.
            ``save_pretrained`` of one process raises ValueError from then on: ``trainer.save_model`` saves the model.
        name: of the head, an ``nn.Linear`` among ``model.named_modules()``.
        mesh: as for :class:`ShardedHead`.
        num_classes: C of a new head, of random rows; None: the head stays as large as it is.
        seed: of random rows, the same on every process.

    Returns:
        the head.

    Raises:
        ValueError: if the module cannot be sharded, or as :class:`ShardedHead`; names the remedy.
    """
    head = model.get_submodule(name)
    _check_head(model, name, head)
    config = getattr(model, "config", None)
    if num_classes is not None and not hasattr(model, "num_labels"):
        raise ValueError(
            f"num_classes is {num_classes}, and {type(model).__name__} has no num_labels to set: "
            "make the model with its head on the meta device, and leave num_classes out"
        )
    is_new = num_classes is not None or head.weight.is_meta
    device = next((one.device for one in model.parameters() if not one.is_meta), torch.device("cpu"))
    given = head.in_features, num_classes or head.out_features, head.bias is not None, mesh
    sharded = ShardedHead(*given, device=device, dtype=head.weight.dtype, seed=seed)
    if is_new:
        sharded.initialise(seed, getattr(config, "initializer_range", None))
    else:
        sharded.copy_rows(head.weight, head.bias)
    if num_classes is not None:
        config.num_labels = model.num_labels = num_classes
    sharded.requires_grad_(head.weight.requires_grad)
    model.set_submodule(name, sharded)
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    own = [f"{name}.{parameter}" for parameter, _ in sharded.named_parameters()]
    model._ddp_params_and_buffers_to_ignore = [*ignored, *own]
    if hasattr(model, "save_pretrained") and sharded.shard.number > 1:
        model.save_pretrained = partial(only_saved_whole, model)
    return sharded


def sharded_heads(model: nn.Module) -> dict[str, ShardedHead]:
    """Finds the sharded heads of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ShardedHead)}


def _check_head(model: nn.Module, name: str, head: nn.Module) -> None:
    """Checks that a module can be replaced by a sharded head."""
    if isinstance(head, ShardedHead):
        raise ValueError(f"{name} is sharded already: call shard_head once")
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        raise ValueError(
            f"{name} is a {type(head).__name__}: a sharded head takes the place of a plain nn.Linear; shard the head "
            "before adapters or quantisation are added, or leave it whole"
        )
    if type(head.weight) is not nn.Parameter:
        raise ValueError(
            f"the weight of {name} is a {type(head.weight).__name__}, which something else spreads over processes: "
            "load the model without tp_plan and before FSDP wraps it"
        )
    if head.bias is not None and type(head.bias) is not nn.Parameter:
        raise ValueError(
            f"the bias of {name} is a {type(head.bias).__name__} and its weight is whole: bias and weight have to be "
            "spread alike; make both whole"
        )
    tied = [
        other
        for other, module in model.named_modules()
        if other != name and any(one is head.weight for one in module.parameters(recurse=False))
    ]
    if tied:
        raise ValueError(
            f"the weight of {name} is tied to {', '.join(tied)}, which needs all rows: untie them "
            "(tie_word_embeddings=False), or leave the head whole"
        )
    if any("final_logits_bias" in dict(module.named_buffers(recurse=False)) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} adds final_logits_bias to the logits of all classes, which is not sharded: leave "
            "the head whole"
        )
