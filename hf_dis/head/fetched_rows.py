"""Rows of an output layer that processes hold, fetched by the processes that need them; gradients go back.

Each process holds C / P rows, and needs those of its own sampled classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_dis.head.row_gradients import coalesced, sparse_rows
from hf_dis.head.vocab_shard import VocabShard


class AskedRows(NamedTuple):
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

    def only(self, places: Tensor) -> AskedRows:
        """Tells each process that this one needs some of its rows only; every process has to call it.

        Args:
            places: of these rows among those that this process needs, ascending, ``[U]``.
        """
        starts = torch.tensor([0, *self.needed], device=places.device).cumsum(0)
        ends = torch.searchsorted(places, starts)
        everyones = self.processes.gather(ends.diff()).tolist()  # waits for an accelerator
        index = self.processes.index
        needed, asked = everyones[index], [one[index] for one in everyones]
        of_process = places - starts[:-1].repeat_interleave(ends.diff())
        theirs = self.processes.exchange(of_process.int(), needed, asked).long()
        first = torch.tensor([0, *self.asked[:-1]], device=places.device).cumsum(0)
        theirs += first.repeat_interleave(torch.tensor(asked, device=places.device))
        return AskedRows(self.processes, self.rows[theirs], needed, asked)

    def _sent(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        width = values.shape[1]
        sizes = ([width * number for number in numbers] for numbers in (sent, received))
        return self.processes.exchange(values.flatten(), *sizes).view(-1, width)


def fetched_rows(
    weight: Tensor, bias: Tensor | None, asked: AskedRows, dtype: torch.dtype, row_sparse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Fetches the rows that this process needs, ``[U, d]``, and their biases, ``[U]`` or None.

    The gradient of a row is the sum of those of all processes, divided by their number. Every process has to call
    this, and to run its backward.

    Args:
        weight, bias: the rows of this process, ``[S, d]`` and ``[S]`` or None.
        asked: the rows that the processes need.
        dtype: of the result.
        row_sparse: give weight and bias sparse gradients, of the rows that some process needs. A sparse gradient of
            the result leaves rows out; then those of all processes have to be sparse.
    """
    found = _Fetched.apply(weight, bias, asked, dtype, row_sparse)
    return (found, None) if bias is None else found


class _Fetched(torch.autograd.Function):
    """The rows of a layer that this process needs, and their biases, in the type of the product."""

    @staticmethod
    def forward(ctx, weight, bias, asked, dtype, row_sparse):
        ctx.asked, ctx.size, ctx.row_sparse = asked, len(weight), row_sparse
        ctx.dtypes = [weight.dtype, None if bias is None else bias.dtype]
        rows = weight[asked.rows].to(dtype)
        if bias is None:
            return asked.there(rows)
        found = asked.there(torch.cat([rows, bias[asked.rows, None].to(dtype)], 1))
        return found[:, :-1].contiguous(), found[:, -1].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, weight_grad, bias_grad=None):
        asked = ctx.asked
        if weight_grad.is_sparse:  # some of the rows have a gradient
            both = [None if one is None else coalesced(one) for one in (weight_grad, bias_grad)]
            asked = asked.only(both[0]._indices()[0])
            weight_grad, bias_grad = (None if one is None else one._values() for one in both)
        parts = [weight_grad] if bias_grad is None else [weight_grad, bias_grad[:, None]]
        gradients = asked.back(torch.cat(parts, 1))
        wide = torch.promote_types(ctx.dtypes[0], torch.float32)
        gradients = gradients.to(wide).div_(asked.processes.number)
        ids, size = asked.rows, ctx.size
        if ctx.row_sparse:
            touched, ids = ids.unique(return_inverse=True)
            size = len(touched)
        total = gradients.new_zeros(size, gradients.shape[1]).index_add_(0, ids, gradients)
        found = [total] if ctx.dtypes[1] is None else [total[:, :-1], total[:, -1]]
        found = [one.to(dtype).contiguous() for one, dtype in zip(found, ctx.dtypes, strict=False)]
        if ctx.row_sparse:
            found = [sparse_rows(touched, one, (ctx.size, *one.shape[1:])) for one in found]
        return (*found, *[None] * (5 - len(found)))
