"""Steps on CUDA tensors without a device: fake tensors have shapes, types and devices, and no values.

A mix of devices raises there as on a device. Operations whose result depends on values, for which the host would wait,
answer with made-up values and are noted.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import weakref
from collections.abc import Iterator
from unittest import mock

import torch
import torch.cuda.amp.common
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {"_local_scalar_dense", "nonzero", "unique_consecutive", "masked_select", "repeat_interleave", "equal"}
WAITING |= {"_unique2", "_coalesce"}


def tensors_of(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Waits(TorchDispatchMode):
    """Counts by line of the package the operations for which the host would wait.

    Attributes:
        lines: of file and function, how often each operation was called.
    """

    def __init__(self):
        super().__init__()
        self.lines = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.split("::")[1], kwargs or {}
        given = tensors_of((args, kwargs))
        first = given[0] if given else None
        by_mask = name == "index" and any(one is not None and one.dtype is torch.bool for one in args[1])
        if any(one.is_cuda for one in given) and (by_mask or (name in WAITING and not kwargs.get("output_size"))):
            self.lines[_caller(), name] += 1
        if name == "_local_scalar_dense":
            return True if first.dtype is torch.bool else 0.5 if first.is_floating_point() else 1
        if name == "equal":
            return True
        if name == "nonzero":
            return first.new_empty(first.numel(), first.dim(), dtype=torch.long)
        if name == "masked_select" or (name == "repeat_interleave" and not kwargs.get("output_size")):
            return first.new_empty(first.numel())
        if name in ("unique_consecutive", "_unique2"):
            return first.new_empty(first.numel()), torch.empty_like(first), first.new_empty(first.numel())
        if by_mask:
            return first.new_empty(args[1][0].numel(), *first.shape[args[1][0].dim() :])
        if name == "_coalesce":
            parts = first._indices(), first._values(), first.shape
            return torch.sparse_coo_tensor(*parts, is_coalesced=True, check_invariants=False)
        result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_") and any(one.is_cuda for one in given) and not tensors_of(result)[0].is_cuda:
            self.lines[_caller(), "to the host"] += 1
        return result


def _caller() -> str:
    frame = sys._getframe(2)
    while frame and "/hf_dis/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/hf_dis/', 1)[1]}:{frame.f_code.co_name}" if frame else "elsewhere"


class Memory(TorchDispatchMode):
    """The bytes of all tensors made under it, fake or not.

    Attributes:
        live: now.
        peak: at most.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {one.untyped_storage()._cdata for one in tensors_of((args, kwargs)) if one.layout is torch.strided}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@contextlib.contextmanager
def fake_cuda() -> Iterator[Waits]:
    """CUDA tensors are fake, and so are all others; autocast takes CUDA as available."""
    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),  # fake tensors have no pinned memory
        FakeTensorMode(allow_non_fake_inputs=True),
        Waits() as waits,
    ):
        yield waits
