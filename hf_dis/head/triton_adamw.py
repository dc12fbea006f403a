"""Triton kernels: the row-sparse step of AdamW; see :mod:`hf_dis.head.optimizer`."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, sum_dtype


@triton.jit
def row_factors_kernel(
    steps,
    row_log_decay,
    row_path,
    ids,
    kept,
    rates,
    scale,
    added,
    num_rows,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    eps: tl.float64,
    log_decay: tl.float64,
    path: tl.float64,
    lr: tl.float64,
    longest: tl.float64,
    BLOCK: tl.constexpr,
):
    """A program counts the step of BLOCK rows, and computes the factors of their step in float64."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    used = number < num_rows
    row = tl.load(ids + number, used, 0)
    # A number alone stands in a sum below, since Triton's interpreter would round it to float32.
    step = tl.load(steps + row, used, 0) + 1
    decay = log_decay - tl.load(row_log_decay + row, used, 0)
    missed = path - tl.load(row_path + row, used, 0)
    bias1 = 1 - tl.exp(step.to(tl.float64) * log_beta1)
    bias2 = 1 - tl.exp(step.to(tl.float64) * log_beta2)
    tl.store(kept + number, tl.exp(decay), used)
    tl.store(rates + number, tl.minimum(tl.maximum(missed, missed * 0 + lr), missed * 0 + longest), used)
    tl.store(scale + number, bias1 / tl.sqrt(bias2), used)
    tl.store(added + number, bias1 * eps, used)
    tl.store(steps + row, step, used)
    tl.store(row_log_decay + row, decay * 0 + log_decay, used)
    tl.store(row_path + row, missed * 0 + path, used)


@triton.jit
def step_kernel(
    parameter,
    mean,
    square,
    ids,
    rows,
    kept,
    rates,
    scale,
    added,
    num_rows,
    width,
    beta1: tl.float64,
    beta2: tl.float64,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A program steps a block of rows: gradient, moments and weights are read once, and the last two written once."""
    number = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    used = number < num_rows
    inside = used[:, None] & (place < width)[None, :]
    row = tl.load(ids + number, used, 0)
    at = (row * width)[:, None] + place[None, :]
    dtype: tl.constexpr = kept.dtype.element_ty
    gradient = tl.load(rows + (number * width)[:, None] + place[None, :], inside, 0).to(dtype)
    first = tl.load(mean + at, inside, 0).to(dtype)
    first += (gradient - first) * tl.cast(1 - beta1, dtype)
    second = tl.load(square + at, inside, 0).to(dtype) * tl.cast(beta2, dtype)
    second += gradient * gradient * tl.cast(1 - beta2, dtype)
    root = tl.sqrt(second) * tl.load(scale + number, used, 0)[:, None] + tl.load(added + number, used, 1)[:, None]
    weight = tl.load(parameter + at, inside, 0).to(dtype) * tl.load(kept + number, used, 0)[:, None]
    tl.store(parameter + at, weight - tl.load(rates + number, used, 0)[:, None] * first / root, inside)
    tl.store(mean + at, first, inside)
    tl.store(square + at, second, inside)


@torch.library.custom_op("hf_dis::row_factors", mutates_args=("steps", "row_log_decay", "row_path"))
def row_factors(
    steps: Tensor,
    row_log_decay: Tensor,
    row_path: Tensor,
    ids: Tensor,
    betas: list[float],
    eps: float,
    sums: list[float],
    lengths: list[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts a step of each row, marks its sums as done, and computes the factors of the step; see :func:`step_rows`.

    Args:
        steps, row_log_decay, row_path: of all rows, ``[C]``.
        ids: the rows, each once, int64, ``[U]``.
        betas, eps: of AdamW.
        sums: ``log_decay`` and ``path`` of the parameter.
        lengths: the shortest and the longest step of a row.
        dtype: of the factors.

    Returns:
        four values per row, ``[U]`` each. The first two are the share of the weight that the missed decay leaves, and
        the learning rate. The other two are the factor of the root of the second moment, and the term to add to that
        product.
    """
    kept, rates, scale, added = (ids.new_empty(len(ids), dtype=dtype) for _ in range(4))
    with torch.cuda.device_of(ids):
        row_factors_kernel[(triton.cdiv(len(ids), 256),)](
            steps,
            row_log_decay,
            row_path,
            ids,
            kept,
            rates,
            scale,
            added,
            len(ids),
            *(math.log(beta) if beta else -math.inf for beta in betas),
            eps,
            *sums,
            *lengths,
            BLOCK=256,
        )
    return kept, rates, scale, added


@row_factors.register_fake
def _(steps, row_log_decay, row_path, ids, betas, eps, sums, lengths, dtype):
    return tuple(ids.new_empty(len(ids), dtype=dtype) for _ in range(4))


@torch.library.custom_op("hf_dis::step_rows", mutates_args=("parameter", "mean", "square"))
def step_rows(
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    ids: Tensor,
    rows: Tensor,
    factors: list[Tensor],
    betas: list[float],
) -> None:
    """Steps the rows of a parameter by AdamW, in place.

    Args:
        parameter, mean, square: the weights and their two moments, contiguous, ``[C, ...]``.
        ids: the rows, each once, int64, ``[U]``.
        rows: their gradient, ``[U, ...]``.
        factors: of :func:`row_factors`.
        betas: of AdamW.
    """
    rows = rows.contiguous()
    width = math.prod(rows.shape[1:])
    block = block_size(width, 1024)
    block_rows = 1024 // block
    with torch.cuda.device_of(parameter):
        step_kernel[triton.cdiv(len(ids), block_rows), triton.cdiv(width, block)](
            parameter,
            mean,
            square,
            ids,
            rows,
            *factors,
            len(ids),
            width,
            *betas,
            BLOCK_ROWS=block_rows,
            BLOCK_WIDTH=block,
        )


@step_rows.register_fake
def _(parameter, mean, square, ids, rows, factors, betas):
    return None


def adamw(
    parameter: Tensor, state: dict[str, Any], group: dict[str, Any], ids: Tensor, rows: Tensor, longest: float
) -> None:
    """Steps rows of a parameter as :class:`hf_dis.head.optimizer.RowSparseAdamW` does, in two launches.

    Args:
        parameter: contiguous, ``[C, ...]``.
        state, group: of the parameter in the optimizer, with this step added to ``log_decay`` and ``path``.
        ids: the rows, each once, int64, ``[U]``.
        rows: their gradient, ``[U, ...]``.
        longest: of :func:`hf_dis.head.optimizer.longest_step`.
    """
    betas = list(group["betas"])
    factors = row_factors(
        state["step"],
        state["row_log_decay"],
        state["row_path"],
        ids,
        betas,
        group["eps"],
        [state["log_decay"], state["path"]],
        [group["lr"], longest],
        sum_dtype(parameter, rows),
    )
    step_rows(parameter, state["exp_avg"], state["exp_avg_sq"], ids, rows, list(factors), betas)
