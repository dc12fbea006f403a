"""Counts of a step on fake CUDA tensors: launches, waits, copies, bytes moved and peak memory; no device is needed.

Shapes, devices and types are those of an accelerator, and no memory is taken (``torch._subclasses.FakeTensorMode``).
Operations whose size depends on data are answered with sizes that are given, and each counts as a wait of the host.
Not seen: streams, speed, numerics, and kernels that lack a type.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Kernels of one dispatched operation where it is not one, read off ATen's CUDA sources and rounded.
KERNELS = {
    "topk": 4,
    "sort": 6,
    "index_add": 2,
    "cumsum": 2,
    "nonzero": 5,
    "unique_consecutive": 8,
    "_unique2": 14,
    "masked_select": 6,
    "repeat_interleave": 4,
    "logsumexp": 8,
    "_coalesce": 14,
    "_embedding_bag": 2,
}
NO_KERNEL = {
    "alias", "detach", "view", "_unsafe_view", "lift_fresh", "device", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "set_", "resize_", "is_same_size", "is_coalesced", "sparse_dim", "dense_dim",
    "_local_scalar_dense", "_nnz", "_values", "_indices", "_coalesced_", "_sparse_coo_tensor_with_dims",
    "_sparse_coo_tensor_with_dims_and_tensors",
}  # fmt: skip
# Kernels that read or write rows of matrices: the places of the matrices and of the rows in the arguments.
ROWS_OF = {
    "_embedding_bag_per_sample_weights_backward": ((1,), 2),
    "item_products": ((1,), 2),
    "features_gradient": ((1,), 2),
    "sampled_head": ((1,), 2),
    "gathered_rows": ((0,), 1),
    "step_rows": ((0, 1, 2), 3),
}
# Rows of an argument that a kernel and a later one read once between them, and the later one counts.
READ_LATER = {"segment_pieces": 4}  # a row of a tail is one contribution: of a piece, or added by join_pieces
# Kernels of Triton that write an argument and do not read it.
WRITES_ARGUMENT = {"exact_terms"}
# Operations that read nothing of their first argument but its shape and type.
READS_NOTHING = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
# Kernels that read single elements of their first argument, and the number of these elements.
ELEMENTS_OF = {
    "rank_groups": lambda args: args[1].numel() * args[3],
    "answers_at": lambda args: len(args[0]) * (args[3].shape[1] + 1),
}
# Of the first argument only what is addressed is read, or written.
READS_ROWS = {"embedding", "index_select", "gather", "take", "index"}
# Kernels that sum rows of their first argument, and find rows that they met before in the device's cache.
BAGS = {"_embedding_bag", "_embedding_bag_forward_only"}
WRITES_ROWS = {"index_copy_", "index_fill_", "scatter_", "index_add_", "scatter_add_"}
# References to a gradient in :func:`backward` where nothing else holds the gradient.
ALONE = 4
_TOLIST = FakeTensor.tolist
# A pageable copy of more bytes makes the host wait; a smaller one is staged by the driver.
PAGEABLE = 2**16


class Counts(TorchDispatchMode):
    """Counts while it is entered, inside :func:`fake_cuda`.

    Args:
        sizes: answers for operations whose size depends on data, by their name; the largest size there can be where
            it is not given.

    Attributes:
        launches: kernels, by the place in hf_dis that started them.
        waits: the host waits for the device, by place and operation.
        moved: bytes read and written, by place and operation.
    """

    def __init__(self, sizes: dict[str, int | list[int]] | None = None):
        super().__init__()
        self.sizes = sizes or {}
        self._held: dict[int, weakref.ref] = {}
        self._pinned: dict[int, weakref.ref] = {}
        self._live: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        """Counts from zero; memory that is held now counts as given."""
        self.launches, self.waits, self.moved = Counter(), Counter(), Counter()
        self._base, self._most = self._live.copy(), self._live.copy()

    def pin(self, tensor: Tensor) -> Tensor:
        """Stands for ``Tensor.pin_memory``, which fake tensors lack."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._pinned[key] = weakref.ref(storage, lambda _: self._pinned.pop(key, None))
        return tensor

    def tolist(self, tensor: Tensor) -> list:
        """Stands for ``Tensor.tolist``, which waits for a device once.

        The answer is the first sizes given for ``tolist in FILE``, a file of hf_dis, or for ``tolist``, or ones.
        """
        place = _place()
        sizes = self.sizes.get(f"tolist in {place.split(':')[0]}")
        if tensor.is_cuda:
            self.waits[place, "tolist"] += 1
            sizes = sizes or self.sizes.get("tolist", [1] * len(tensor))
        return _TOLIST(tensor) if sizes is None else list(sizes)[: len(tensor)]

    def peak(self, device: str = "cuda") -> int:
        """The most bytes that a type of devices held at a time beyond those held at :meth:`start`."""
        return self._most[device] - self._base[device]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        inputs = tensors_of((args, kwargs))
        place = _place()
        is_fake = any(one.is_cuda for one in inputs)
        out = self._answer(func, name, args, kwargs, inputs, place, is_fake)
        outputs = tensors_of(out)
        self._hold(outputs)
        self._count_copy(name, args, inputs, outputs, place)
        is_fake = is_fake or any(one.is_cuda for one in outputs)
        if is_fake and name not in NO_KERNEL and not func.is_view:
            self.launches[place] += KERNELS.get(name, 1)
            in_place = func._schema.is_mutable and "out" not in kwargs and name not in WRITES_ARGUMENT
            self.moved[place, name] += _bytes(name, in_place, args, tensors_of(args), outputs)
        return out

    def _answer(
        self, func: Any, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], place: str, is_fake: bool
    ) -> Any:
        """The result of an operation; where it depends on data, one of the size that was given."""
        first = inputs[0] if inputs else None
        size = self._size_of(name, args, first)
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        if size is None and name not in ("_local_scalar_dense", "equal", "_coalesce") and not repeats:
            return func(*args, **kwargs)
        if is_fake:
            self.waits[place, name] += 1
        if name == "_local_scalar_dense":
            return True if first.dtype is torch.bool else 0.5 if first.is_floating_point() else 1
        if name == "equal":
            return True
        if name == "_coalesce":
            return torch.sparse_coo_tensor(
                first._indices(), first._values(), first.shape, check_invariants=False, is_coalesced=True
            )
        if name == "nonzero":
            return first.new_empty(size, first.dim(), dtype=torch.long)
        if name in ("unique_consecutive", "_unique2"):
            return first.new_empty(size), torch.empty_like(first), first.new_empty(size)
        if name == "index":
            mask = next(one for one in args[1] if one is not None)
            return first.new_empty(size, *first.shape[mask.dim() :])
        return first.new_empty(self.sizes.get(name, first.numel()))

    def _size_of(self, name: str, args: tuple, first: Tensor | None) -> int | None:
        by_mask = name == "index" and any(one is not None and one.dtype is torch.bool for one in args[1])
        if name in ("nonzero", "unique_consecutive", "_unique2", "masked_select") or by_mask:
            return min(first.numel(), self.sizes.get(name, first.numel()))
        return None

    def _count_copy(self, name: str, args: tuple, inputs: list[Tensor], outputs: list[Tensor], place: str) -> None:
        if name not in ("_to_copy", "copy_") or not outputs:
            return
        source, target = (args[1], args[0]) if name == "copy_" else (inputs[0], outputs[0])
        if source.is_cuda and not target.is_cuda:
            self.waits[place, "to the processor"] += 1
        elif target.is_cuda and not source.is_cuda and source.nbytes > PAGEABLE and not self._is_pinned(source):
            self.waits[place, "pageable copy"] += 1

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _hold(self, tensors: list[Tensor]) -> None:
        parts = (
            part
            for one in tensors
            for part in ((one._values(), one._indices()) if one.layout is torch.sparse_coo else (one,))
        )
        for part in parts:
            storage, device = part.untyped_storage(), part.device.type
            key, size = storage._cdata, storage.nbytes()
            if key in self._held:
                continue

            def drop(_: Any, key: int = key, size: int = size, device: str = device) -> None:
                self._held.pop(key, None)
                self._live[device] -= size

            self._held[key] = weakref.ref(storage, drop)
            self._live[device] += size
            self._most[device] = max(self._most[device], self._live[device])


def tensors_of(values: object) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


_TO = nn.Module.to


def _moved_if_elsewhere(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Stands for ``nn.Module.to``, which cannot move fake parameters, not even to the place where they are."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    for one in (*module.parameters(), *module.buffers()):
        is_there = device is None or (one.device.type, one.device.index or 0) == (device.type, device.index or 0)
        if not is_there or dtype not in (None, one.dtype):
            return _TO(module, *args, **kwargs)
    return module


def _place() -> str:
    """The line of hf_dis that an operation comes from."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/hf_dis/hf_dis/" in file or ("/hf_dis/" in file and "site-packages/torch" not in file):
            return f"{file.rsplit('/hf_dis/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def _bytes(name: str, mutates: bool, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation reads and writes."""

    def size(one: Tensor) -> int:
        return one.nbytes if one.layout is torch.strided and one.is_cuda else 0

    read, written = sum(map(size, inputs)), sum(map(size, outputs))
    if name in READS_NOTHING:
        return written
    if name in ROWS_OF:
        places, ids = ROWS_OF[name]
        matrices = [args[place] for place in places]
        rows = args[ids].numel() * sum(one[0].nbytes for one in matrices)
        return read - sum(map(size, matrices)) + written + rows * (2 if mutates else 1)
    if name in READ_LATER and len(args) > READ_LATER[name]:
        read -= sum(map(size, tensors_of(args[READ_LATER[name]])))
    if name in ELEMENTS_OF:
        return read - size(args[0]) + written + ELEMENTS_OF[name](args) * args[0].element_size()
    if name in BAGS:
        return written + min(args[1].numel(), len(args[0])) * args[0][0].nbytes
    if name in READS_ROWS:
        return 2 * written + sum(map(size, inputs[1:]))
    if name in WRITES_ROWS:
        return 2 * sum(map(size, inputs[1:]))
    if mutates:
        return read + (size(inputs[0]) if inputs else 0)
    return read + written


@contextmanager
def fake_cuda(sizes: dict[str, int | list[int]] | None = None) -> Iterator[Counts]:
    """Within this context CUDA tensors are fake, and operations are counted.

    Args:
        sizes: as for :class:`Counts`.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", lambda *args: None))
        stack.enter_context(mock.patch.object(torch.cuda, "set_device", lambda device: None))
        stack.enter_context(mock.patch.object(nn.Module, "to", _moved_if_elsewhere))
        # torch asks for tensors of its own types; the norms of all gradients take one launch then.
        of_device = lambda tensors, device: clip_grad._device_has_foreach_support(device)  # noqa: E731
        stack.enter_context(mock.patch.object(clip_grad, "_has_foreach_support", of_device))
        own = Tensor.backward
        by_nodes = lambda loss: backward(loss) if loss.is_cuda else own(loss)  # noqa: E731
        stack.enter_context(mock.patch.object(Tensor, "backward", by_nodes))
        counts = Counts(sizes)
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor: counts.pin(tensor)))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: counts.tolist(tensor)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(counts)


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """``loss.backward()`` by calling the nodes: autograd's engine refuses CUDA nodes where there is no driver."""
    waiting, stack, seen = Counter(), [loss.grad_fn], {loss.grad_fn}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    pending, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = pending.pop(node, {})
        call = node.apply if hasattr(node, "_forward_cls") else node  # the node of a custom Function is its context
        gradients = call(*[given.get(i) for i in range(max(1, len(getattr(node, "_input_metadata", [0]))))])
        del given
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for (following, i), gradient in zip(node.next_functions, gradients, strict=False):
            if following is None:
                continue
            if gradient is not None:
                wanted = following.variable if hasattr(following, "variable") else following._input_metadata[i]
                if gradient.layout is torch.strided:
                    gradient = gradient if gradient.shape == (*wanted.shape,) else gradient.sum_to_size(wanted.shape)
                    gradient = gradient.to(wanted.dtype)
                is_alone = gradient.layout is not torch.strided or sys.getrefcount(gradient) <= ALONE
                if is_alone and hasattr(following, "variable") and wanted.grad is None:
                    wanted.grad = gradient  # the engine takes a gradient as it is where nothing else holds it
                    continue
                slot = pending.setdefault(following, {})
                slot[i] = slot[i] + gradient if i in slot else gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
