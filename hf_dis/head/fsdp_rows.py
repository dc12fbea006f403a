"""An output layer that FSDP2 shards, in a step on sampled classes: its rows stay sharded and are not gathered.

Each process has items and a sample of its own, and C / P rows. Of two ways the one that sends fewer bytes is taken. On
the first way a process gets the rows of its sampled classes, and sends their gradients back. On the second way the
features of all processes go to the rows, and logits come back. Nothing that is sent grows with C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from hf_dis.head.gathered_items import logits_of_all_items, padded_number
from hf_dis.head.sampled_linear import sampled_columns, sampled_logits
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.models.fsdp_units import KeptSharded
from hf_dis.models.spread import is_fully_sharded, is_sharded_by_fsdp, reshard
from hf_dis.models.ties import modules_with
from hf_dis.precision import product_type

ID_BYTES = 4


class StepNumbers(NamedTuple):
    """Numbers of a step that decide what the processes send to each other.

    Attributes:
        rows: the sampled classes of each process that each process holds, ``[P][P]``.
        items: N of each process.
        own: R, the columns of an item.
        tails: G.
        shared: K_t, the columns of a tail.
        width: values of a row, its bias among them.
        itemsize: bytes of a value.
    """

    rows: Sequence[Sequence[int]]
    items: Sequence[int]
    own: int
    tails: int
    shared: int
    width: int
    itemsize: int

    def bytes_of_rows(self) -> int:
        """Counts the bytes that all processes get where rows travel: class ids, rows and the rows' gradients."""
        others = sum(sum(rows) - rows[process] for process, rows in enumerate(self.rows))
        return others * (ID_BYTES + 2 * self.width * self.itemsize)

    def bytes_of_features(self) -> int:
        """Counts the bytes that all processes get where features travel: ids, features, logits, and gradients."""
        most, columns = padded_number(self.items, self.tails), self.own + self.shared
        ids = most * self.own + self.tails * self.shared
        values = 2 * most * (self.width + columns)
        return len(self.items) * (len(self.items) - 1) * (ids * ID_BYTES + values * self.itemsize)


class FsdpRows:
    """The rows of an output layer that this process holds, kept sharded until :meth:`release`.

    The gradient of a row is a mean over the processes, as FSDP2 gives all other parameters.

    Args:
        model: that FSDP2 sharded, with no unit gathered.
        layer: of its output head; the weight, ``[C, d]``, and the bias are sharded by their rows.
        embeddings: that share the weight.

    Attributes:
        embeddings: as given; :meth:`embedded` has to take the place of their forward.
    """

    def __init__(self, model: nn.Module, layer: nn.Linear, embeddings: Sequence[nn.Embedding] = ()):
        self.weight, self.bias, self.embeddings = layer.weight, layer.bias, embeddings
        self._kept = KeptSharded(model, list(layer.parameters(recurse=False)))
        self._processes = VocabShard(0, 1, self.weight.device_mesh.get_group())
        # Shard(0) cuts rows as torch.chunk does: the last parts may be shorter, or empty.
        self._rows_each = -(-len(self.weight) // self._processes.number)

    @classmethod
    def of(cls, model: nn.Module, layer: nn.Linear) -> FsdpRows | None:
        """Finds the rows of a layer; None where every process has the whole layer, or FSDP2 has to gather it.

        FSDP2 gathers a layer that several groups of processes hold, or that is offloaded to the processor. So it does
        if the weight is shared with more than plain embeddings, or is in several units.

        Args:
            model: the student.
            layer: of its output head.
        """
        if not is_fully_sharded(model):
            return None
        reshard(model)  # units that FSDP2 keeps whole after a forward
        parameters = list(layer.parameters(recurse=False))
        if not all(map(is_sharded_by_fsdp, parameters)):
            return None
        mesh = layer.weight.device_mesh
        if mesh.size() == 1 or layer.weight.device.type != mesh.device_type:
            return None
        others = [module for module in modules_with(model, layer.weight).values() if module is not layer]
        if not all(map(_is_plain_embedding, others)):
            return None
        rows = cls(model, layer, others)
        # A unit that is not set up is gathered, and its embeddings run as they are.
        return rows if rows._kept.found or not others else None

    def release(self) -> None:
        """Lets FSDP2 gather the layer again."""
        self._kept.release()

    def sampled(self, features: Tensor, item_ids: Tensor, tail_ids: Tensor, added: Tensor | None = None) -> Tensor:
        """Computes the logits of sampled classes for the items of this process, ``[N, R + K_t]``.

        Every process of the group has to call this, and to run its backward.

        Args:
            features: the head's input for the items of this process, ``[N, d]``.
            item_ids, tail_ids: as for :func:`hf_dis.head.sampled_linear.sampled_logits`.
            added: a bias beside that of the layer, of all classes, ``[C]``, or None.
        """
        features = features.to(product_type(features))
        used_tails = tail_ids[: max(1, len(features))]
        ids, places = torch.cat([item_ids.flatten(), used_tails.flatten()]).unique(return_inverse=True)
        numbers, is_alike = self._numbers(ids, features, item_ids, tail_ids)
        weight, bias = (one.to_local() if isinstance(one, DTensor) else None for one in (self.weight, self.bias))
        all_hold_rows = self._rows_each * (self._processes.number - 1) < len(self.weight)
        if all_hold_rows and is_alike and numbers.bytes_of_features() < numbers.bytes_of_rows():
            start = self._rows_each * self._processes.index
            shard = VocabShard(start, start + len(weight), self._processes.group)
            given = features, weight, bias, item_ids, tail_ids, shard, numbers.items
            logits = logits_of_all_items(*given).clone()  # FSDP2 warns of an output that is a view
            if added is None:
                return logits
            return logits + sampled_columns(added.expand(len(features), -1), item_ids, tail_ids)
        fetched = _Fetched.apply(weight, bias, self._asked(ids, numbers.rows), features.dtype)
        rows, bias = fetched if self.bias is not None else (fetched, None)
        if added is not None:
            extra = added[ids].to(rows.dtype)
            bias = extra if bias is None else bias + extra
        of_items, of_tails = places.split([item_ids.numel(), used_tails.numel()])
        return sampled_logits(features, rows, bias, of_items.view_as(item_ids), of_tails.view_as(used_tails))

    def embedded(self, embedding: nn.Embedding, ids: Tensor) -> Tensor:
        """Computes the output of an embedding that shares the weight, in the type in which FSDP2 would gather it.

        Every process of the group has to call this, and to run its backward.

        Args:
            embedding: one of ``embeddings``.
            ids: of tokens, ``[...]``.
        """
        needed, places = ids.unique(return_inverse=True)
        rows = [numbers[:-1] for numbers in self._gathered(needed, [0])]
        asked = self._asked(needed, rows)
        found = _Fetched.apply(self.weight.to_local(), None, asked, self._kept.dtype or self.weight.dtype)
        if embedding.padding_idx is not None:  # its row has no gradient
            found = torch.where(needed[:, None] == embedding.padding_idx, found.detach(), found)
        return F.embedding(places, found)

    def _numbers(self, ids: Tensor, features: Tensor, item_ids: Tensor, tail_ids: Tensor) -> tuple[StepNumbers, bool]:
        """The numbers of a step, and True if all processes have as many columns and tails."""
        shapes = item_ids.shape[1], *tail_ids.shape
        everyones = self._gathered(ids, [len(features), *shapes])
        rows, items = [one[:-4] for one in everyones], [one[-4] for one in everyones]
        width = self.weight.shape[1] + (self.bias is not None)
        numbers = StepNumbers(rows, items, *shapes, width, features.dtype.itemsize)
        return numbers, all(tuple(one[-3:]) == shapes for one in everyones)

    def _gathered(self, ids: Tensor, numbers: Sequence[int]) -> list[list[int]]:
        """Gathers of each process the number of ascending ids that each process holds, and other numbers."""
        ends = torch.arange(1, self._processes.number + 1, device=ids.device) * self._rows_each
        ends = torch.searchsorted(ids, ends)
        own = torch.cat([ends.diff(prepend=ends.new_zeros(1)), ends.new_tensor(numbers)])
        return self._processes.gather(own).tolist()  # waits for an accelerator

    def _asked(self, ids: Tensor, rows: Sequence[Sequence[int]]) -> _Asked:
        """Tells each process the classes whose rows this process needs."""
        index = self._processes.index
        needed, asked = rows[index], [one[index] for one in rows]
        theirs = self._processes.exchange(ids.int(), needed, asked).long()
        return _Asked(self._processes, theirs - self._rows_each * index, needed, asked)


class _Asked(NamedTuple):
    """The rows of this process that the processes need, one process after another, and the numbers of rows.

    Attributes:
        processes: that exchange rows.
        rows: places among the rows of this process, ``[Σ asked]``.
        needed: rows that this process needs of each process.
        asked: rows that each process needs of this one.
    """

    processes: VocabShard
    rows: Tensor
    needed: list[int]
    asked: list[int]

    def there(self, values: Tensor) -> Tensor:
        """Sends rows to the processes that need them: ``[Σ needed, w]`` for ``[Σ asked, w]``."""
        return self._sent(values, self.asked, self.needed)

    def back(self, values: Tensor) -> Tensor:
        """Sends the gradients of rows to the processes that hold them: ``[Σ asked, w]`` for ``[Σ needed, w]``."""
        return self._sent(values, self.needed, self.asked)

    def _sent(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        width = values.shape[1]
        sizes = ([width * number for number in numbers] for numbers in (sent, received))
        return self.processes.exchange(values.flatten(), *sizes).view(-1, width)


class _Fetched(torch.autograd.Function):
    """The rows of a layer that this process needs, and their biases, in the type of the product."""

    @staticmethod
    def forward(ctx, weight, bias, asked, dtype):
        ctx.asked, ctx.size, ctx.dtypes = asked, len(weight), [weight.dtype, None if bias is None else bias.dtype]
        rows = weight[asked.rows].to(dtype)
        if bias is None:
            return asked.there(rows)
        found = asked.there(torch.cat([rows, bias[asked.rows, None].to(dtype)], 1))
        return found[:, :-1].contiguous(), found[:, -1].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, weight_grad, bias_grad=None):
        parts = [weight_grad] if bias_grad is None else [weight_grad, bias_grad[:, None]]
        gradients = ctx.asked.back(torch.cat(parts, 1))
        wide = torch.promote_types(ctx.dtypes[0], torch.float32)
        gradients = gradients.to(wide).div_(ctx.asked.processes.number)
        total = gradients.new_zeros(ctx.size, gradients.shape[1]).index_add_(0, ctx.asked.rows, gradients)
        if ctx.dtypes[1] is None:
            return total.to(ctx.dtypes[0]), None, None, None
        return total[:, :-1].to(ctx.dtypes[0]).contiguous(), total[:, -1].to(ctx.dtypes[1]).contiguous(), None, None


def _is_plain_embedding(module: nn.Module) -> bool:
    """Returns True if a module looks rows up and does nothing else to them, or to their gradient."""
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return False
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
