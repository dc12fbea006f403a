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
from torch.distributed.tensor import DTensor

from hf_dis.head.fetched_rows import AskedRows, fetched_rows
from hf_dis.head.gathered_items import logits_of_all_items, padded_number
from hf_dis.head.sampled_linear import sampled_columns, sampled_logits
from hf_dis.head.spread_rows import sparse_leaf
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.models.fsdp_units import KeptSharded
from hf_dis.models.spread import is_fully_sharded, is_sharded_by_fsdp, reshard
from hf_dis.models.ties import modules_with
from hf_dis.precision import product_type
from hf_dis.sampling.designs import Updates

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
        updated: classes that update the head, of each process; not counted as bytes.
    """

    rows: Sequence[Sequence[int]]
    items: Sequence[int]
    own: int
    tails: int
    shared: int
    width: int
    itemsize: int
    updated: Sequence[int] = ()

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
        row_sparse: give weight and bias gradients as :func:`hf_dis.head.spread_rows.sparse_leaf` does.

    Attributes:
        embeddings: as given; :meth:`embedded` has to take the place of their forward.
    """

    def __init__(
        self, model: nn.Module, layer: nn.Linear, embeddings: Sequence[nn.Embedding] = (), row_sparse: bool = False
    ):
        self.weight, self.bias, self.embeddings = layer.weight, layer.bias, embeddings
        self._row_sparse = row_sparse
        self._kept = KeptSharded(model, list(layer.parameters(recurse=False)))
        self._processes = VocabShard(0, 1, self.weight.device_mesh.get_group())
        # Shard(0) cuts rows as torch.chunk does: the last parts may be shorter, or empty.
        self._rows_each = -(-len(self.weight) // self._processes.number)

    @classmethod
    def of(cls, model: nn.Module, layer: nn.Linear, row_sparse: bool = False) -> FsdpRows | None:
        """Finds the rows of a layer; None where every process has the whole layer, or FSDP2 has to gather it.

        FSDP2 gathers a layer that several groups of processes hold, or that is offloaded to the processor. FSDP2 also
        gathers a layer whose weight is shared with more than plain embeddings, or is in several units.

        Args:
            model: the student.
            layer: of its output head.
            row_sparse: as for the rows.

        Raises:
            ValueError: if FSDP2 has to gather a layer whose gradient is to be row-sparse; names the cause.
        """
        if not is_fully_sharded(model):
            return None
        reshard(model)  # units that FSDP2 keeps whole after a forward
        others = [module for module in modules_with(model, layer.weight).values() if module is not layer]
        cause, rows = _why_gathered(layer, others), None
        if cause is None and (row_sparse or layer.weight.device_mesh.size() > 1):
            rows = cls(model, layer, others, row_sparse)
            # A unit that is not set up is gathered, and its embeddings run as they are.
            if others and not rows._kept.found:
                cause, rows = "the student has not run on all classes yet, and shares the weight", None
        if row_sparse and rows is None:
            raise ValueError(
                f"row_sparse_head is set, and FSDP2 has to gather the output head, since {cause}: set "
                "row_sparse_head=False"
            )
        return rows

    def release(self) -> None:
        """Lets FSDP2 gather the layer again."""
        self._kept.release()

    def sampled(
        self,
        features: Tensor,
        item_ids: Tensor,
        tail_ids: Tensor,
        added: Tensor | None = None,
        updates: Updates | None = None,
    ) -> Tensor:
        """Computes the logits of sampled classes for the items of this process, ``[N, R + K_t]``.

        Every process of the group has to call this, and to run its backward.

        Args:
            features: the head's input for the items of this process, ``[N, d]``.
            item_ids, tail_ids: as for :func:`hf_dis.head.sampled_linear.sampled_logits`.
            added: a bias beside that of the layer, of all classes, ``[C]``, or None.
            updates: the sample of the classes of this process whose rows get a gradient; None: all of them. Dense
                gradients always have all rows.
        """
        updates = updates if self._row_sparse else None
        features = features.to(product_type(features))
        used_tails = tail_ids[: max(1, len(features))]
        ids, places = torch.cat([item_ids.flatten(), used_tails.flatten()]).unique(return_inverse=True)
        numbers, is_alike = self._numbers(ids, features, item_ids, tail_ids, updates)
        weight, bias = self._own()
        all_hold_rows = self._rows_each * (self._processes.number - 1) < len(self.weight)
        if all_hold_rows and is_alike and numbers.bytes_of_features() < numbers.bytes_of_rows():
            start = self._rows_each * self._processes.index
            shard = VocabShard(start, start + len(weight), self._processes.group)
            given = features, weight, bias, item_ids, tail_ids, shard, numbers.items
            if updates is not None:
                updates = updates._replace(number=sum(numbers.updated))
            logits = logits_of_all_items(*given, self._row_sparse, updates)
            logits = logits.clone()  # FSDP2 warns of an output that is a view
            if added is None:
                return logits
            return logits + sampled_columns(added.expand(len(features), -1), item_ids, tail_ids)
        rows, bias = fetched_rows(weight, bias, self._asked(ids, numbers.rows), features.dtype, self._row_sparse)
        if added is not None:
            extra = added[ids].to(rows.dtype)
            bias = extra if bias is None else bias + extra
        of_items, of_tails = places.split([item_ids.numel(), used_tails.numel()])
        places = of_items.view_as(item_ids), of_tails.view_as(used_tails)
        return sampled_logits(features, rows, bias, *places, updates is not None, updates)

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
        dtype = self._kept.dtype or self.weight.dtype
        found, _ = fetched_rows(self._own()[0], None, asked, dtype, self._row_sparse)
        if embedding.padding_idx is None:
            return F.embedding(places, found)
        is_padding = needed == embedding.padding_idx  # its row has no gradient
        if self._row_sparse:
            number = int(is_padding.nonzero()) if bool(is_padding.any()) else None
            return F.embedding(places, found, number, sparse=True)
        return F.embedding(places, torch.where(is_padding[:, None], found.detach(), found))

    def _own(self) -> tuple[Tensor, Tensor | None]:
        """The rows of the weight and of the bias that this process holds."""
        both = (one if isinstance(one, DTensor) else None for one in (self.weight, self.bias))
        how = sparse_leaf if self._row_sparse else DTensor.to_local
        return tuple(None if one is None else how(one) for one in both)

    def _numbers(
        self, ids: Tensor, features: Tensor, item_ids: Tensor, tail_ids: Tensor, updates: Updates | None
    ) -> tuple[StepNumbers, bool]:
        """The numbers of a step, and True if all processes have as many columns and tails."""
        shapes, number = (item_ids.shape[1], *tail_ids.shape), 0 if updates is None else updates.number
        everyones = self._gathered(ids, [number, len(features), *shapes])
        rows, updated, items = [one[:-5] for one in everyones], *zip(*(one[-5:-3] for one in everyones), strict=True)
        width = self.weight.shape[1] + (self.bias is not None)
        numbers = StepNumbers(rows, items, *shapes, width, features.dtype.itemsize, updated)
        return numbers, all(tuple(one[-3:]) == shapes for one in everyones)

    def _gathered(self, ids: Tensor, numbers: Sequence[int]) -> list[list[int]]:
        """Gathers of each process the number of ascending ids that each process holds, and other numbers."""
        ends = torch.arange(1, self._processes.number + 1, device=ids.device) * self._rows_each
        ends = torch.searchsorted(ids, ends)
        own = torch.cat([ends.diff(prepend=ends.new_zeros(1)), ends.new_tensor(numbers)])
        return self._processes.gather(own).tolist()  # waits for an accelerator

    def _asked(self, ids: Tensor, rows: Sequence[Sequence[int]]) -> AskedRows:
        """Tells each process the classes whose rows this process needs."""
        index = self._processes.index
        needed, asked = rows[index], [one[index] for one in rows]
        theirs = self._processes.exchange(ids.int(), needed, asked).long()
        return AskedRows(self._processes, theirs - self._rows_each * index, needed, asked)


def _why_gathered(layer: nn.Linear, others: Sequence[nn.Module]) -> str | None:
    """The reason for which FSDP2 has to gather a layer in every step; None: it need not.

    Args:
        layer: of an output head, with its unit sharded.
        others: modules that share its weight.
    """
    if not all(map(is_sharded_by_fsdp, layer.parameters(recurse=False))):
        return "its rows are not sharded over one group of processes"
    if layer.weight.device.type != layer.weight.device_mesh.device_type:
        return "its parameters are offloaded to the processor"
    if not all(map(is_plain_embedding, others)):
        return "its weight is tied to more than a plain nn.Embedding"
    return None


def is_plain_embedding(module: nn.Module) -> bool:
    """Returns True if a module looks rows up and does nothing else to them, or to their gradient."""
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return False
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
