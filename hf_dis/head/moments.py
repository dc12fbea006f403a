"""Moments of the rows of a step, for :class:`hf_dis.RowSparseAdamW`: read and written where they lie, in their type.

Moments in bfloat16 are rounded at random: up with the probability of the part that is cut off, so that the mean is
exact. Rounded to nearest, a second moment with β = 0.999 would never fall, since a step takes a tenth of a percent.
The random bits are a hash (splitmix64, https://doi.org/10.1145/2714064.2660195) of the row, the row's step and the
column. So they depend neither on the order of the rows nor on a generator, and a resumed run has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENT_DTYPES = (None, torch.float32, torch.bfloat16)

# Of splitmix64, as signed numbers: the increment, and two multipliers with the shifts before them.
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
MIXED = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
# Bits of a float32 that a bfloat16 lacks.
CUT_BITS = 16


def lie_in_host_memory(parameter: Tensor, offload: bool) -> bool:
    """Returns True if the moments of a row-sparse parameter lie in host memory, and the parameter does not.

    The moments of a bias stay where the bias is: they are smaller than the counters of its rows.

    Args:
        parameter: ``[C, ...]``.
        offload: the setting.
    """
    return offload and parameter.dim() > 1 and parameter.device.type != "cpu"


def type_of_moments(parameter: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The type of the moments of a row-sparse parameter; those of a bias have the type of the bias.

    Args:
        parameter: ``[C, ...]``.
        wanted: the setting; None: the type of the parameter.
    """
    return parameter.dtype if wanted is None or parameter.dim() == 1 else wanted


def type_of_step(parameter: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The type in which the rows of a parameter are stepped: its own, or float32 or wider for moments of a set type.

    Args:
        parameter, wanted: as for :func:`type_of_moments`.
    """
    is_own = wanted is None or parameter.dim() == 1
    return parameter.dtype if is_own else torch.promote_types(parameter.dtype, torch.float32)


def are_rounded(moments: torch.dtype, step: torch.dtype) -> bool:
    """Returns True if moments are rounded at random: to bfloat16, of a wider type.

    Args:
        moments: their type.
        step: the type in which they are computed.
    """
    return moments == torch.bfloat16 != step


class RowMoments:
    """The moments of some rows, on the device of the parameter.

    Rows that lie in host memory travel in one pinned buffer, there and back. The host waits for the way back.

    Args:
        state: of the parameter, with both moments, ``[C, ...]``, and the steps of the rows, this one counted.
        ids: the rows, on the device of the parameter, ``[n]``.
        places: the same, on the device of the moments.
        travel: the moments lie in host memory, as :func:`lie_in_host_memory` tells.
        dtype: of :func:`type_of_step`.

    Attributes:
        mean, square: the moments of the rows, ``[n, ...]`` each.
    """

    def __init__(self, state: dict[str, Any], ids: Tensor, places: Tensor, travel: bool, dtype: torch.dtype):
        self._moments, self._steps = [state[name] for name in MOMENTS], state["step"]
        self._ids, self._places, self._buffer = ids, places, None
        rows = [moment.index_select(0, places) for moment in self._moments]
        if travel:
            self._buffer = torch.stack(rows)
            if ids.device.type == "cuda":
                self._buffer = self._buffer.pin_memory()
            rows = self._buffer.to(ids.device, non_blocking=True, copy=True).unbind()
        self.mean, self.square = (values.to(dtype) for values in rows)

    def write(self) -> None:
        """Takes the rows back to where they lie, in the type of the moments."""
        rows, dtype = (self.mean, self.square), self._moments[0].dtype
        if are_rounded(dtype, self.mean.dtype):
            bits = random_bits(self._ids, self._steps.index_select(0, self._ids), self.mean.shape[1:])
            rows = [rounded(values, one) for values, one in zip(rows, bits, strict=True)]
        else:
            rows = [values.to(dtype) for values in rows]
        if self._buffer is not None:
            rows = self._buffer.copy_(torch.stack(rows)).unbind()
        for moment, values in zip(self._moments, rows, strict=True):
            moment.index_copy_(0, self._places, values)


def random_bits(ids: Tensor, steps: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Computes 16 random bits for each of two moments of every weight of some rows.

    Args:
        ids: the rows, below 2**31, ``[n]``.
        steps: of the rows, below 2**32, ``[n]``.
        shape: of a row.

    Returns:
        two tensors of numbers in [0, 2**16), int32, ``[n, *shape]``; the same for the same row, step and column.
    """
    key = _mixed((ids << 32) + steps.long())
    columns = torch.arange(1, shape.numel() + 1, device=ids.device) * INCREMENT
    bits = _mixed(key[:, None] + columns).view(-1, *shape)
    return tuple(_shifted(bits, shift).bitwise_and_(2**CUT_BITS - 1).int() for shift in (32, 48))


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds finite numbers to bfloat16 at random, so that the mean over the bits is exact.

    Args:
        values: float32, or a type that is rounded to it first.
        bits: of :func:`random_bits`, of the same shape.
    """
    # The sum carries into the bits that are kept with the probability of the part below them, away from zero.
    kept = (values.float().view(torch.int32) + bits).bitwise_and_(-(2**CUT_BITS))
    return kept.view(torch.float32).bfloat16()


def _mixed(numbers: Tensor) -> Tensor:
    """The hash of splitmix64, int64."""
    for shift, multiplier in MIXED:
        numbers = (numbers ^ _shifted(numbers, shift)) * multiplier
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, shift: int) -> Tensor:
    """Shifts int64 to the right as numbers without a sign."""
    return (numbers >> shift).bitwise_and_(2 ** (64 - shift) - 1)
