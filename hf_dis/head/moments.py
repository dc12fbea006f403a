"""Moments of the rows of a step, for :class:`hf_dis.RowSparseAdamW`: read and written where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def lie_in_host_memory(parameter: Tensor, offload: bool) -> bool:
    """Returns True if the moments of a row-sparse parameter lie in host memory, and the parameter does not.

    The moments of a bias stay where the bias is: they are smaller than the counters of its rows.

    Args:
        parameter: ``[C, ...]``.
        offload: the setting.
    """
    return offload and parameter.dim() > 1 and parameter.device.type != "cpu"


class RowMoments:
    """The moments of some rows, on the device of the parameter.

    Rows that lie in host memory travel in one pinned buffer, there and back. The host waits for the way back.

    Args:
        state: of the parameter, with both moments, ``[C, ...]``.
        ids: the rows, on the device of the parameter, ``[n]``.
        places: the same, on the device of the moments.
        travel: the moments lie in host memory, as :func:`lie_in_host_memory` tells.

    Attributes:
        mean, square: the moments of the rows, ``[n, ...]`` each.
    """

    def __init__(self, state: dict[str, Any], ids: Tensor, places: Tensor, travel: bool):
        self._moments, self._places, self._buffer = [state[name] for name in MOMENTS], places, None
        rows = [moment.index_select(0, places) for moment in self._moments]
        if travel:
            self._buffer = torch.stack(rows)
            if ids.device.type == "cuda":
                self._buffer = self._buffer.pin_memory()
            rows = self._buffer.to(ids.device, non_blocking=True).unbind()
        self.mean, self.square = rows

    def write(self) -> None:
        """Takes the rows back to where they lie."""
        rows = self.mean, self.square
        if self._buffer is not None:
            rows = self._buffer.copy_(torch.stack(rows)).unbind()
        for moment, values in zip(self._moments, rows, strict=True):
            moment.index_copy_(0, self._places, values)
