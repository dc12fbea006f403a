"""OnlineTeacher: a teacher that runs beside the student, its answers ranked in chunks of items."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from hf_dis.items import Items
from hf_dis.models.provenance import stored_values
from hf_dis.models.spread import is_fully_sharded, whole
from hf_dis.models.tasks import base_model, find_task, num_outputs
from hf_dis.teacher.cached import CachedTeacher
from hf_dis.teacher.logit_checks import check_support, check_teacher_logits
from hf_dis.teacher.stream import LogitStream
from hf_dis.teacher.targets import ALL_CLASSES_CHUNKS, BLOCKS_OF_CHUNK, TeacherTargets


class OnlineTeacher:
    """Ranks the logits of a teacher that runs beside the student, chunk by chunk.

    No ``[N, C]`` tensor outlives a chunk. The model is frozen, in evaluation mode, and never saved. Where FSDP2 shards
    the model, every process has to ask, and gathers the output layer once per call.

    Args:
        model: any model that returns ``.logits``, ``[B, C]`` or ``[B, S, C]``; may be offloaded, spread or sharded.
        num_classes: C, the first classes of the model, which it shares with the student.
        temperature: τ > 0.
        depth: m, the ranks to resolve.
        chunk_items: items per chunk; None: as :func:`hf_dis.teacher.targets.chunk_items` chooses for the device.
        context: entered around each forward; ``accelerator.autocast`` for mixed precision.
        may_mask: classes may have the probability 0.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        temperature: float,
        depth: int,
        chunk_items: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
        may_mask: bool = True,
    ):
        self.model = model.eval().requires_grad_(False)
        self.num_classes, self.temperature, self.depth = num_classes, temperature, depth
        self.may_mask = may_mask
        self.num_outputs = _num_outputs(model) or num_classes
        self.stream = LogitStream(model, self.num_outputs, chunk_items, context)

    def __call__(self, inputs: dict[str, Tensor], items: Items, check_values: bool = True) -> Iterator[TeacherTargets]:
        """Yields the ranked targets of each chunk of items, in order; takes the arguments of :meth:`all_classes`."""
        first_item, is_whole = 0, self.num_outputs == self.num_classes  # targets have all outputs of the model
        for logits in self._logits(inputs, items, check_values, check_finite=check_values and not is_whole):
            targets = TeacherTargets(logits, self.temperature, self.depth, BLOCKS_OF_CHUNK, len(items))
            if check_values and is_whole:
                targets.check_finite(first_item)
            first_item += len(targets)
            yield targets
            del logits, targets  # the next chunk is computed without this one in memory

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the teacher's weights, 16 characters, from at most 128 values of each weight.

        Values on the meta device are unreachable; they stand for their name, shape and type. Every process has to ask
        for the digest of a teacher that FSDP2 shards, which is that of the whole teacher.
        """
        digest = hashlib.sha256()
        for name, tensor in self._identifying():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            if tensor.is_meta:
                digest.update(str(tensor.dtype).encode())
            else:
                values = tensor.flatten()[:: max(1, tensor.numel() // 64)].cpu()  # MPS has no float64
                digest.update(values.to(torch.float64).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _identifying(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the weights by which the teacher is recognised."""
        return ((name, whole(value)) for name, value in stored_values(self.model))

    def all_classes(self, inputs: dict[str, Tensor], items: Items, check_values: bool = True) -> Iterator[Tensor]:
        """Yields the logits of each chunk of items, ``[n, C]``.

        Args:
            inputs: of the model, without labels.
            items: the items wanted.
            check_values: look for NaN and Inf; on an accelerator this waits for the device.

        Raises:
            ValueError: if the logits have more or fewer columns than the model has classes, or mask classes that
                the student has, unless the teacher may.
            FloatingPointError: if the logits hold NaN or Inf; names the items.
        """
        return self._logits(inputs, items, check_values, check_values, ALL_CLASSES_CHUNKS)

    def _logits(
        self,
        inputs: dict[str, Tensor],
        items: Items,
        check_values: bool,
        check_finite: bool,
        chunks: int | None = None,
    ) -> Iterator[Tensor]:
        first_item = 0
        for logits in self.stream(inputs, items, chunks):
            check_teacher_logits(logits, self.num_outputs, first_item, check_finite)
            logits = logits[:, : self.num_classes]
            if check_values and not self.may_mask:
                check_support(logits, first_item)
            first_item += len(logits)
            yield logits
            del logits


def _num_outputs(model: nn.Module) -> int | None:
    """Counts the classes of a transformers model; None for any other module."""
    return num_outputs(model, find_task(model)) if hasattr(base_model(model), "config") else None


def check_asked_alone(teacher: OnlineTeacher | CachedTeacher) -> None:
    """Checks that a process may ask a teacher while other processes do not.

    Args:
        teacher: of a loss on all classes, asked once more in backward.

    Raises:
        ValueError: if FSDP2 shards the teacher.
    """
    if isinstance(teacher, OnlineTeacher) and is_fully_sharded(teacher.model):
        raise ValueError(
            "the items of a loss on all classes count differently, so that a process asks the teacher once more. FSDP "
            "has sharded the teacher, which all processes run together. Begin the step with holds_logits=True, or "
            "load the teacher whole"
        )
