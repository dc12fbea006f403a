"""Triton kernel: the gradient on the features by the classes of the tails, added to that by the items' own classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_dis.head.triton_products import wide_type
from hf_dis.kernels import unit_columns

# Items and columns of a program, and the bytes of a row of a factor that it multiplies at a time. Three blocks of both
# factors take 96 KiB, and a multiprocessor of an A100 shares 163 KiB.
BLOCK_ITEMS, BLOCK_WIDTH, BYTES = 128, 128, 128


@triton.jit
def tails_gradient_kernel(
    scales, rows, own, factor, out, num_items, num_shared, width, num_tails, scales_stride,
    WIDE: tl.constexpr, WIDENS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_SHARED: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A program multiplies the gradient of BLOCK_ITEMS items of a tail by BLOCK_WIDTH columns of the tail's rows."""
    tail = tl.program_id(2).to(tl.int64)
    item = (tl.program_id(1).to(tl.int64) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)) * num_tails + tail
    place = tl.program_id(0).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    exists, inside = (item < num_items)[:, None], (place < width)[None, :]
    total = tl.zeros((BLOCK_ITEMS, BLOCK_WIDTH), WIDE)
    for start in range(0, num_shared, BLOCK_SHARED):
        column = start + tl.arange(0, BLOCK_SHARED)
        used = column < num_shared
        scale = tl.load(scales + (item * scales_stride)[:, None] + column[None, :], exists & used[None, :], 0)
        places = rows + ((tail * num_shared + column) * width)[:, None] + place[None, :]
        vectors = tl.load(places, used[:, None] & inside, 0)
        if WIDENS:
            scale, vectors = scale.to(WIDE), vectors.to(WIDE)
        total = tl.dot(scale, vectors, total, input_precision=PRECISION)
    here = (item * width)[:, None] + place[None, :]
    total += tl.load(own + here, exists & inside, 0).to(WIDE)
    tl.store(out + here, total * tl.load(factor).to(WIDE), exists & inside)


@torch.library.custom_op("hf_dis::tails_gradient", mutates_args=())
def tails_gradient(scales: Tensor, rows: Tensor, own: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes factor · (own + Σ_k scale_k row_k) of each item, summed in float32 or wider, ``[N, d]``.

    Args:
        scales: the gradient on the products of items with their tails, ``[N, K_t]``.
        rows: of each tail, in the same type, ``[G, K_t, d]``; item i is of tail ``i mod G``.
        own: is added to each item, ``[N, d]``.
        factor: of the sum, a scalar.
        dtype: of the result.
    """
    scales, own = unit_columns(scales), own.contiguous()
    out = own.new_empty(own.shape, dtype=dtype)
    (num_items, width), (num_tails, num_shared) = own.shape, rows.shape[:2]
    grid = triton.cdiv(width, BLOCK_WIDTH), triton.cdiv(triton.cdiv(num_items, num_tails), BLOCK_ITEMS), num_tails
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    with torch.cuda.device_of(own):
        tails_gradient_kernel[grid](
            scales, rows.contiguous(), own, factor, out, num_items, num_shared, width, num_tails, scales.stride(0),
            WIDE=wide_type(scales),
            WIDENS=not scales.is_cuda,  # the interpreter would multiply the bits of bfloat16
            PRECISION=precision, BLOCK_ITEMS=BLOCK_ITEMS, BLOCK_WIDTH=BLOCK_WIDTH,
            BLOCK_SHARED=BYTES // scales.element_size(), num_warps=8,
        )  # fmt: skip
    return out


@tails_gradient.register_fake
def _(scales, rows, own, factor, dtype):
    return own.new_empty(own.shape, dtype=dtype)
