"""Triton kernels: rows of a matrix taken out, and put in their places, in another type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.kernels import block_size, unit_columns

# Rows and columns of a program.
BLOCK, BLOCK_WIDTH = 4, 512


@triton.jit
def gathered_rows_kernel(
    matrix, ids, out, num_ids, num_rows, width, stride, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """A program copies BLOCK_WIDTH columns of BLOCK rows into another type."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    row = tl.load(ids + number, number < num_ids, -1)
    is_row = (row >= 0) & (row < num_rows)
    inside = (place < width)[None, :]
    values = tl.load(matrix + (row * stride)[:, None] + place[None, :], is_row[:, None] & inside, float("nan"))
    at = out + (number * width)[:, None] + place[None, :]
    tl.store(at, values.to(out.dtype.element_ty), (number < num_ids)[:, None] & inside)


@triton.jit
def placed_rows_kernel(
    rows, ids, out, num_ids, num_rows, width, stride, steps, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """A program writes BLOCK_WIDTH columns of BLOCK rows of the result, whose places are looked up."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + num_ids
    for _ in range(0, steps):  # the first id that is not below the row lies in low..high
        middle = (low + high) // 2
        is_below = (low < high) & (tl.load(ids + middle, low < high, 0) < row)
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_below, high, middle)
    is_there = (low < num_ids) & (tl.load(ids + low, low < num_ids, -1) == row)
    inside = (place < width)[None, :]
    values = tl.load(rows + (low * stride)[:, None] + place[None, :], is_there[:, None] & inside, 0)
    at = out + (row * width)[:, None] + place[None, :]
    tl.store(at, values.to(out.dtype.element_ty), (row < num_rows)[:, None] & inside)


@torch.library.custom_op("hf_dis::gathered_rows", mutates_args=())
def gathered_rows(matrix: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Gathers rows of a matrix in a type, ``[..., d]``.

    Args:
        matrix: ``[M, d]``.
        ids: of rows, ``[...]``; an id outside 0..M-1 gives NaN.
        dtype: of the result.
    """
    matrix, ids = unit_columns(matrix), ids.contiguous()
    out = matrix.new_empty(*ids.shape, matrix.shape[1], dtype=dtype)
    sizes = ids.numel(), *matrix.shape, matrix.stride(0)
    with torch.cuda.device_of(matrix):
        gathered_rows_kernel[_grid(ids.numel(), matrix)](
            matrix, ids, out, *sizes, BLOCK=BLOCK, BLOCK_WIDTH=_width(matrix)
        )
    return out


@gathered_rows.register_fake
def _(matrix, ids, dtype):
    return matrix.new_empty(*ids.shape, matrix.shape[1], dtype=dtype)


@torch.library.custom_op("hf_dis::placed_rows", mutates_args=())
def placed_rows(rows: Tensor, ids: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Puts rows in their places in a matrix that is zero elsewhere, ``[M, d]``.

    Args:
        rows: ``[N, d]``.
        ids: their places, ascending and distinct, ``[N]``; a row with an id outside 0..M-1 is left out.
        num_rows: M.
        dtype: of the result.
    """
    rows, ids = unit_columns(rows), ids.contiguous()
    out = rows.new_empty(num_rows, rows.shape[1], dtype=dtype)
    sizes = len(ids), *out.shape, rows.stride(0), len(ids).bit_length()
    with torch.cuda.device_of(rows):
        placed_rows_kernel[_grid(num_rows, out)](rows, ids, out, *sizes, BLOCK=BLOCK, BLOCK_WIDTH=_width(out))
    return out


@placed_rows.register_fake
def _(rows, ids, num_rows, dtype):
    return rows.new_empty(num_rows, rows.shape[1], dtype=dtype)


def _grid(num_rows: int, matrix: Tensor) -> tuple[int, int]:
    return triton.cdiv(num_rows, BLOCK), triton.cdiv(matrix.shape[1], _width(matrix))


def _width(matrix: Tensor) -> int:
    return block_size(matrix.shape[1], BLOCK_WIDTH)
