"""The teacher that runs beside the student."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_dis.items import Items
from hf_dis.models.tasks import base_model, find_task, num_outputs
from hf_dis.teacher.stream import LogitStream
from hf_dis.teacher.targets import TeacherTargets, check_teacher_logits


class OnlineTeacher:
    """A teacher that runs beside the student and is ranked by chunks of items.

    No ``[N, C]`` tensor outlives a chunk. Never trained, never saved, in evaluation mode throughout.

    Args:
        model: any model that returns ``.logits``, ``[B, C]`` or ``[B, S, C]``.
        num_classes: C, those that it shares with the student: the first of its own.
        temperature: τ > 0.
        depth: m, how many ranks to resolve.
        chunk_items: items a chunk; by default as many as keep a chunk's logits within 64 MiB.
        context: entered around each forward; ``accelerator.autocast`` for mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        temperature: float,
        depth: int,
        chunk_items: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model = model.eval().requires_grad_(False)
        self.num_classes, self.temperature, self.depth = num_classes, temperature, depth
        self.num_outputs = _num_outputs(model) or num_classes
        self.stream = LogitStream(model, self.num_outputs, chunk_items, context)

    def __call__(self, inputs: dict[str, Tensor], items: Items, check_values: bool = True) -> Iterator[TeacherTargets]:
        """Yields the ranked targets of each chunk of items, in order; see :meth:`all_classes`."""
        # map holds no chunk back, as a loop's variable would while the next one is computed.
        return map(self._rank, self.all_classes(inputs, items, check_values))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the teacher's weights, from at most 128 values of each: another teacher has another one."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            values = tensor.flatten()[:: max(1, tensor.numel() // 64)]
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values.to("cpu", torch.float64).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _rank(self, logits: Tensor) -> TeacherTargets:
        return TeacherTargets(logits, self.temperature, self.depth)

    def all_classes(self, inputs: dict[str, Tensor], items: Items, check_values: bool = True) -> Iterator[Tensor]:
        """Yields the logits of each chunk of items, ``[n, C]``.

        Args:
            inputs: of the model, without labels.
            items: which to ask for.
            check_values: look for NaN and Inf; on an accelerator this waits for the device.

        Raises:
            ValueError: if the logits do not have as many columns as said.
            FloatingPointError: if they hold NaN or Inf; names the items.
        """
        first_item = 0
        for logits in self.stream(inputs, items):
            check_teacher_logits(logits, self.num_outputs, first_item, check_values)
            first_item += len(logits)
            yield logits[:, : self.num_classes]
            del logits


def _num_outputs(model: nn.Module) -> int | None:
    """How many classes a transformers model answers for; None for any other module."""
    return num_outputs(model, find_task(model)) if hasattr(base_model(model), "config") else None
