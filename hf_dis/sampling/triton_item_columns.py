"""Triton kernel: the columns of an item's own classes from the teacher's targets, a program per item."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, unit_columns
from hf_dis.sampling.triton_assembly import ranked_columns


@triton.jit
def item_columns_kernel(
    ids, log_probs, label_log_probs, expected, cumulative, starts, labels,
    item_ids, log_weights, out_log_probs, target, tail_mass, ranks, rank_weights,
    depth, num_sampled, ids_stride, log_probs_stride, label_stride, density_stride,
    HAS_LABEL: tl.constexpr, ALL_RANKS: tl.constexpr, STEPS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """A program makes the columns of K ranks and of the label."""
    item = tl.program_id(0).to(tl.int64)
    if HAS_LABEL:
        label_log_probs += item * label_stride
    k = tl.arange(0, BLOCK_RANKS)
    own, log_prob, log_weight, _, wanted, label, label_log_prob, rest = ranked_columns(
        ids + item * ids_stride, log_probs + item * log_probs_stride, expected, cumulative, starts, labels,
        label_log_probs, ranks, rank_weights, item, k, depth, num_sampled, density_stride,
        HAS_LABEL, ALL_RANKS, STEPS, BLOCK_DEPTH,
    )  # fmt: skip
    used = k < num_sampled
    first = item * (num_sampled + (1 if HAS_LABEL else 0))
    tl.store(item_ids + first + k, own, used)
    tl.store(log_weights + first + k, log_weight, used)
    tl.store(out_log_probs + first + k, log_prob, used)
    tl.store(target + first + k, wanted, used)
    tl.store(tail_mass + item, rest)
    if HAS_LABEL:
        last = first + num_sampled
        tl.store(item_ids + last, label)
        tl.store(log_weights + last, 0.0)
        tl.store(out_log_probs + last, label_log_prob)
        tl.store(target + last, tl.exp(label_log_prob))


Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("hf_dis::item_columns", mutates_args=())
def item_columns(
    ids: Tensor,
    log_probs: Tensor,
    label_log_probs: Tensor | None,
    num_sampled: int,
    expected: Tensor | None,
    cumulative: Tensor | None,
    starts: Tensor | None,
    labels: Tensor | None,
) -> Columns:
    """Makes the columns of every item's own classes from the teacher's targets.

    Args:
        ids: the m best-ranked classes of each item, ``[N, m]``.
        log_probs: of these classes, ``[N, m]``, float32 or wider.
        label_log_probs: of the labels, ``[N, 1]``; None without labels.
        num_sampled: K.
        expected, cumulative, starts: as for :func:`hf_dis.sampling.triton_assembly.assemble`.
        labels: class ids ``[N]``.

    Returns:
        ``item_ids``, ``log_weights``, ``log_probs``, ``target``, ``tail_mass``, ``ranks`` and ``rank_weights`` of
        :class:`hf_dis.sampling.by_kernels.SampleWithoutTails`.
    """
    ids, log_probs = unit_columns(ids), unit_columns(log_probs)
    columns = _columns(ids, log_probs, labels, num_sampled)
    depth, takes_all = ids.shape[1], expected is None
    of_label = 0 if label_log_probs is None else label_log_probs.stride(0)
    of_density = 0 if takes_all or len(expected) == 1 else expected.stride(0)
    strides = ids.stride(0), log_probs.stride(0), of_label, of_density
    blocks = {"BLOCK_RANKS": block_size(num_sampled, 2**20), "BLOCK_DEPTH": block_size(depth, 2**20)}
    with torch.cuda.device_of(ids):
        item_columns_kernel[(len(ids),)](
            ids, log_probs, label_log_probs, expected, cumulative, starts, labels, *columns,
            depth, num_sampled, *strides,
            HAS_LABEL=labels is not None, ALL_RANKS=takes_all, STEPS=depth.bit_length() + 1, **blocks,
        )  # fmt: skip
    return columns


@item_columns.register_fake
def _(ids, log_probs, label_log_probs, num_sampled, expected, cumulative, starts, labels):
    return _columns(ids, log_probs, labels, num_sampled)


def _columns(ids: Tensor, log_probs: Tensor, labels: Tensor | None, num_sampled: int) -> Columns:
    own = log_probs.new_empty(len(ids), num_sampled + (labels is not None))
    return (
        torch.empty_like(own, dtype=ids.dtype),
        torch.empty_like(own, dtype=torch.float32),
        own,
        torch.empty_like(own),
        own.new_empty(len(ids)),
        ids.new_empty(len(ids), num_sampled),
        own.new_empty(len(ids), num_sampled, dtype=torch.float32),
    )
