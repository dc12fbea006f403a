"""A model's logits by chunks of rows, so that they never exist as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .head_search import find_head
from .heads import head_features
from .rows import Rows
from .tasks import base_model

logger = logging.get_logger(__name__)

# Elements of a chunk's [rows, C] logits: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24


class AfterHead(NamedTuple):
    """What some models do to their logits after the output layer: bias, scale, soft-cap.

    Attributes:
        bias: added, ``[1, C]`` (Bart, Marian, Pegasus, ...), or None.
        scale: multiplied by (Cohere; Granite's divisor inverted).
        soft_cap: c in ``c tanh(z / c)`` (Gemma), or None.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> AfterHead:
        """Read from a transformers model; whether it is all that the model does is for a comparison to say."""
        settings = vars(model.config.get_text_config())
        scale = (settings.get("logit_scale") or 1.0) / (settings.get("logits_scaling") or 1.0)
        buffers = dict(model.named_buffers(recurse=False))
        return cls(buffers.get("final_logits_bias"), scale, settings.get("final_logit_softcapping"))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = (logits / self.soft_cap).tanh() * self.soft_cap
        return logits


class LogitStream:
    """The logits of a model's rows, chunk by chunk, without gradient.

    Where its output layer can be told from the rest, the model runs once, up to that layer, which is then applied to
    chunks of rows; so memory is that of one chunk, however many rows and classes there are. This is compared with the
    whole model on the first batch. Otherwise the whole model runs on chunks of examples.

    Args:
        model: any model that returns ``.logits``, ``[B, C]`` or ``[B, S, C]``.
        num_outputs: how many classes it answers for.
        chunk_rows: rows a chunk; by default as many as keep a chunk's logits within 64 MiB.
        context: entered around each forward; ``accelerator.autocast`` for mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        num_outputs: int,
        chunk_rows: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.context = model, context
        self.chunk_rows = chunk_rows or max(1, CHUNK_ELEMENTS // num_outputs)
        self._head = self._after_head = None
        self._is_compared = False
        if hasattr(base_model(model), "config"):
            try:
                self._head = model.get_submodule(find_head(model, num_outputs))
                self._after_head = AfterHead.of(base_model(model))
            except ValueError as error:
                self._run_whole(str(error))

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], rows: Rows) -> Iterator[Tensor]:
        """Yields the logits of the rows in order, ``[n, C]`` each; at least one chunk, be it empty.

        Args:
            inputs: of the model, without labels.
            rows: which to compute.
        """
        if self._head is not None and not self._is_compared:
            self._compare(inputs, rows)
        return self._by_head(inputs, rows) if self._head is not None else self._by_examples(inputs, rows)

    def _by_head(self, inputs: dict[str, Tensor], rows: Rows) -> Iterator[Tensor]:
        with self.context():
            features = rows.of(head_features(self.model, self._head, inputs))
        for part in features.split(self.chunk_rows):
            with torch.no_grad(), self.context():
                logits = self._after_head(self._head(part))
            yield logits
            del logits  # the next chunk is computed without this one in memory

    def _by_examples(self, inputs: dict[str, Tensor], rows: Rows) -> Iterator[Tensor]:
        chunk_examples = max(1, self.chunk_rows // rows.length)
        first_position = 0
        for chunk in split_examples(inputs, rows.num_examples, chunk_examples):
            with torch.no_grad(), self.context():
                logits = self.model(**chunk).logits
            if rows.positions is not None:
                num_examples = len(logits)
                here = rows.positions - first_position
                here = here[(here >= 0) & (here < num_examples * rows.length)]
                logits = Rows(num_examples, positions=here, length=rows.length).of(logits)
                first_position += num_examples * rows.length
            yield logits
            del logits

    def _compare(self, inputs: dict[str, Tensor], rows: Rows) -> None:
        """Whether the split model gives what the whole one does, on the first example."""
        self._is_compared = True
        first = next(split_examples(inputs, rows.num_examples, 1))
        with self.context():
            whole = self.model(**first).logits
            features = head_features(self.model, self._head, first)
            if features.shape[:-1] != whole.shape[:-1]:
                self._run_whole("it picks tokens after its output layer")
                return
            split = self._after_head(self._head(features))
        eps = max(torch.finfo(whole.dtype).eps, torch.finfo(features.dtype).eps)
        largest = whole.abs().nan_to_num(0, 0, 0).max().clamp_min(1)
        tolerance = 16 * eps * float(largest)
        if not torch.allclose(whole, split.to(whole.dtype), rtol=0, atol=tolerance, equal_nan=True):
            self._run_whole("its logits are not those of its output layer")

    def _run_whole(self, why: str) -> None:
        self._head = None
        logger.warning(
            f"{type(self.model).__name__} cannot be split before its output layer ({why}): it is run on chunks of "
            "examples, whose logits are held at a time"
        )


def split_examples(inputs: dict[str, Tensor], num_examples: int, chunk_examples: int) -> Iterator[dict[str, Tensor]]:
    """Splits model inputs into chunks of examples; what does not have one entry for each is passed whole."""
    for start in range(0, num_examples, chunk_examples):
        yield {
            name: value[start : start + chunk_examples]
            if isinstance(value, Tensor) and value.dim() and len(value) == num_examples
            else value
            for name, value in inputs.items()
        }
