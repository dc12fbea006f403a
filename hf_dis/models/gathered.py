"""The vectors of the items, taken out of those of all tokens in the type in which the head multiplies them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.kernels import uses_triton
from hf_dis.precision import product_type


def gathered(vectors: Tensor, positions: Tensor) -> Tensor:
    """Selects vectors in the type of a linear layer's product, ``[N, d]``, with a gradient.

    Args:
        vectors: of all tokens, ``[T, d]``.
        positions: ascending places among the tokens, ``[N]``.
    """
    return _Gathered.apply(vectors, positions, product_type(vectors))


class _Gathered(torch.autograd.Function):
    """Writes each gradient to its place, where that of an index sorts the places and adds."""

    @staticmethod
    def forward(ctx, vectors, positions, dtype):
        ctx.save_for_backward(positions)
        ctx.shape, ctx.dtype = vectors.shape, vectors.dtype
        if uses_triton(vectors.device):
            from hf_dis.models.triton_gathered import gathered_rows

            return gathered_rows(vectors, positions, dtype)
        return vectors.index_select(0, positions).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (positions,) = ctx.saved_tensors
        if uses_triton(grad.device):
            from hf_dis.models.triton_gathered import placed_rows

            return placed_rows(grad, positions, ctx.shape[0], ctx.dtype), None, None
        gradient = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        return gradient.index_copy_(0, positions, grad.to(ctx.dtype)), None, None
