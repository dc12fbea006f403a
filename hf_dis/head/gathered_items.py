"""Sampled logits where the rows of a head are spread over processes, each of which has items of its own.

The features of all processes are gathered, and each process computes the logits of its classes. The logits of an item
go to the process of the item (arXiv 2010.05222). Nothing that is sent grows with C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.head.own_columns import own_columns
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.sampling.designs import Updates


def logits_of_all_items(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    item_ids: Tensor,
    tail_ids: Tensor,
    shard: VocabShard,
    numbers: Sequence[int],
    row_sparse: bool = False,
    updates: Updates | None = None,
) -> Tensor:
    """Computes the logits of sampled classes for the items of this process, ``[N, R + K_t]``.

    Every process of the group has to call this, with as many columns and tails, and to run its backward. The gradient
    of a row is divided by the number of processes.

    Args:
        features: the head's input for the items of this process, ``[N, d]``.
        weight, bias: the rows of this process, ``[S, d]`` and ``[S]`` or None.
        item_ids, tail_ids, row_sparse: as for :func:`hf_dis.head.sampled_linear.sampled_logits`.
        shard: the classes of the rows.
        numbers: N of each process.
        updates: the sample of the classes of all processes whose rows get a gradient; None: all of them.
    """
    num_tails = len(tail_ids)
    most = padded_number(numbers, num_tails)
    ids = shard.gather(torch.cat([filled(item_ids, most, -1).flatten(), tail_ids.flatten()]).int()).long()
    item_ids, tail_ids = ids.tensor_split([most * item_ids.shape[1]], 1)
    # Items of all processes in turn, so that item i uses tail i mod (P·G) of all tails.
    in_turn = shard.number, most // num_tails, num_tails
    item_ids = item_ids.reshape(*in_turn, -1).transpose(0, 1).flatten(0, 2)
    tail_ids = tail_ids.reshape(shard.number, num_tails, -1)
    # A tail that no item uses counts for nothing.
    used = torch.arange(num_tails) < torch.tensor(numbers)[:, None]
    tail_ids = tail_ids.masked_fill(~used.to(tail_ids.device)[..., None], -1).flatten(0, 1)
    everyones = shard.gathered(filled(features, most))
    everyones = everyones.unflatten(1, in_turn[1:]).transpose(0, 1).flatten(0, 2)
    with torch.autocast(features.device.type, enabled=False):
        given = weight, bias, item_ids, tail_ids, shard.start
        logits = own_columns(everyones, *given, row_sparse, updates, shard.number)
    by_process = logits.unflatten(0, (in_turn[1], shard.number, num_tails)).transpose(0, 1).flatten(1, 2)
    return shard.of_items(by_process)[: len(features)]


def padded_number(numbers: Sequence[int], num_tails: int) -> int:
    """Finds the number of items that each process sends: a multiple of G, and a filler where no process has an item.

    Args:
        numbers: N of each process.
        num_tails: G.
    """
    return -(-max(1, *numbers) // num_tails) * num_tails


def filled(values: Tensor, length: int, filler: int = 0) -> Tensor:
    """Fills values ``[n, ...]`` up to a length."""
    return F.pad(values, (0, 0, 0, length - len(values)), value=filler)
