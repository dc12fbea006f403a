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
def place_rows_kernel(
    out, ids, rows, num_ids, num_rows, width, stride, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """A program writes BLOCK_WIDTH columns of BLOCK rows to their places."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(1).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    row = tl.load(ids + number, number < num_ids, -1)
    is_row = ((row >= 0) & (row < num_rows))[:, None] & (place < width)[None, :]
    values = tl.load(rows + (number * stride)[:, None] + place[None, :], is_row, 0)
    tl.store(out + (row * width)[:, None] + place[None, :], values.to(out.dtype.element_ty), is_row)


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
        gathered_rows_kernel[_grid(ids, matrix)](matrix, ids, out, *sizes, BLOCK=BLOCK, BLOCK_WIDTH=_width(matrix))
    return out


@gathered_rows.register_fake
def _(matrix, ids, dtype):
    return matrix.new_empty(*ids.shape, matrix.shape[1], dtype=dtype)


@torch.library.custom_op("hf_dis::place_rows", mutates_args=("out",))
def place_rows(out: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Writes rows to their places in a matrix, in the type of the matrix.

    Args:
        out: contiguous, ``[M, d]``.
        ids: distinct places, ``[N]``; nothing is written for an id outside 0..M-1.
        rows: ``[N, d]``.
    """
    rows, ids = unit_columns(rows), ids.contiguous()
    sizes = len(ids), *out.shape, rows.stride(0)
    with torch.cuda.device_of(out):
        place_rows_kernel[_grid(ids, out)](out, ids, rows, *sizes, BLOCK=BLOCK, BLOCK_WIDTH=_width(out))


@place_rows.register_fake
def _(out, ids, rows):
    return None


def _grid(ids: Tensor, matrix: Tensor) -> tuple[int, int]:
    return triton.cdiv(ids.numel(), BLOCK), triton.cdiv(matrix.shape[1], _width(matrix))


def _width(matrix: Tensor) -> int:
    return block_size(matrix.shape[1], BLOCK_WIDTH)
