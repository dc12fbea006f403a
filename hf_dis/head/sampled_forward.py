"""The forward of an output layer on sampled classes: whole, sharded, tensor-parallel, or sharded by FSDP2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_dis.head.fsdp_rows import FsdpRows
from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.head.sharded import ShardedHead
from hf_dis.head.tensor_parallel import own_rows
from hf_dis.models.gathered import gathered
from hf_dis.sampling.designs import Updates


class Sampled(NamedTuple):
    """Computes the sampled classes; see :meth:`hf_dis.head.switch.SampledHead.set`."""

    item_ids: Tensor
    tail_ids: Tensor
    positions: Tensor | None
    updates: Updates | None
    row_sparse: bool
    bias: Tensor | None
    fsdp: FsdpRows | None

    def __call__(self, layer: nn.Linear, features: Tensor) -> Tensor:
        """Computes the logits of the sampled classes, ``[N, R + K_t]``, or ``[N, S, R + K_t]`` for ``[N, S, d]``."""
        leading = features.shape[:-1]
        if self.positions is not None:
            features = gathered(features.reshape(-1, features.shape[-1]), self.positions)
        elif len(leading) == 2 and leading[0] == len(self.item_ids):
            # The model picks a position of each example after the head, so all positions compute its classes.
            return self._at_all_positions(layer, features)
        elif leading != self.item_ids.shape[:1]:
            raise ValueError(
                f"the head {type(layer).__name__} got features of shape {tuple(features.shape)} for "
                f"{len(self.item_ids)} items of sampled classes. It has to get one feature vector per item, [N, d], "
                "or a sequence of vectors per item, [N, S, d]: name another head with head_name, or use "
                "head_mode='exact'"
            )
        return self._logits(layer, features, self.item_ids)

    def _at_all_positions(self, layer: nn.Linear, features: Tensor) -> Tensor:
        """Computes the classes of each example at all of its positions: ``[B, S, R + K_t]`` for ``[B, S, d]``."""
        num_items, length = features.shape[:2]
        # The vectors go position by position. The last example is repeated until the number of vectors per position
        # is a multiple of G: then vector i uses tail i mod G at every position.
        repeats = -num_items % len(self.tail_ids)
        items = torch.arange(num_items + repeats, device=features.device).clamp(max=num_items - 1)
        flat = features[items].transpose(0, 1).flatten(0, 1)
        logits = self._logits(layer, flat, self.item_ids[items].repeat(length, 1))
        return logits.unflatten(0, (length, len(items))).transpose(0, 1)[:num_items]

    def _logits(self, layer: nn.Linear, features: Tensor, item_ids: Tensor) -> Tensor:
        if isinstance(layer, ShardedHead):
            return layer.sampled(features, item_ids, self.tail_ids, self.row_sparse, self.updates)
        if self.fsdp is not None:
            return self.fsdp.sampled(features, item_ids, self.tail_ids, self.bias, self.updates)
        rows = own_rows(layer, self.row_sparse)
        if rows is not None:
            weight, bias, shard = rows
            if self.bias is not None:
                added = self.bias[shard.start : shard.stop]
                bias = added if bias is None else bias + added
            ids = item_ids, self.tail_ids
            return sampled_logits(features, weight, bias, *ids, self.row_sparse, self.updates, shard)
        bias = with_bias(layer, self.bias)
        return sampled_logits(features, layer.weight, bias, item_ids, self.tail_ids, self.row_sparse, self.updates)


def with_bias(layer: nn.Linear, added: Tensor | None) -> Tensor | None:
    """Adds a bias, ``[C]`` or None, to that of a layer."""
    if layer.bias is None or added is None:
        return layer.bias if added is None else added
    return layer.bias + added
