"""A model's logits by chunks of items, so that they never exist as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_dis.items import Items, split_examples
from hf_dis.models.after_head import AfterHead
from hf_dis.models.head_features import evaluating, head_features
from hf_dis.models.head_search import find_head
from hf_dis.models.tasks import base_model
from hf_dis.teacher.targets import CHUNK_ELEMENTS

logger = logging.get_logger(__name__)


class LogitStream:
    """The logits of a model's items, chunk by chunk, without gradient.

    Where its output layer can be told from the rest, the model runs once, up to that layer, which is then applied to
    chunks of items; so memory is that of one chunk, however many items and classes there are. This is compared with the
    whole model on the first batch. Otherwise the whole model runs on chunks of examples.

    Args:
        model: any model that returns ``.logits``, ``[B, C]`` or ``[B, S, C]``.
        num_outputs: how many classes it answers for.
        chunk_items: items a chunk; by default as many as keep a chunk's logits within 64 MiB.
        context: entered around each forward; ``accelerator.autocast`` for mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        num_outputs: int,
        chunk_items: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.context = model, context
        self.chunk_items = chunk_items or max(1, CHUNK_ELEMENTS // num_outputs)
        self._head = self.after_head = self._why = None
        self._is_compared = False
        if hasattr(base_model(model), "config"):
            try:
                self._head = model.get_submodule(find_head(model, num_outputs))
                self.after_head = AfterHead.of(base_model(model))
            except ValueError as error:
                self._run_whole(str(error))

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], items: Items) -> Iterator[Tensor]:
        """Yields the logits of the items in order, ``[n, C]`` each; at least one chunk, be it empty.

        Args:
            inputs: of the model, without labels.
            items: which to compute.
        """
        if not self.splits(inputs, items):
            if self._why is not None:
                logger.warning_once(
                    f"{type(self.model).__name__} cannot be split before its output layer ({self._why}): it is run on "
                    "chunks of examples, whose logits are held at a time"
                )
            return self._by_examples(inputs, items)
        with self.context():
            features = items.of(head_features(self.model, self._head, inputs))
        return map(self.of_features, features.split(self.chunk_items))

    @torch.no_grad()
    def splits(self, inputs: dict[str, Tensor], items: Items) -> bool:
        """Tells if the model can be split before its output layer; compared on the first batch that is given."""
        if self._head is not None and not self._is_compared:
            self._compare(inputs, items)
        return self._head is not None

    @torch.no_grad()
    def of_features(self, features: Tensor) -> Tensor:
        """The model's logits ``[n, C]`` of what its output layer is given, ``[n, d]``."""
        with self.context():
            return self.after_head(self._head(features))

    def _by_examples(self, inputs: dict[str, Tensor], items: Items) -> Iterator[Tensor]:
        chunk_examples = max(1, self.chunk_items // items.length)
        first_position = 0
        for chunk in split_examples(inputs, items.num_examples, chunk_examples):
            with torch.no_grad(), self.context():
                logits = self.model(**chunk).logits
            if items.positions is not None:
                num_examples = len(logits)
                here = items.positions - first_position
                here = here[(here >= 0) & (here < num_examples * items.length)]
                logits = Items(num_examples, positions=here, length=items.length).of(logits)
                first_position += num_examples * items.length
            yield logits
            del logits

    def _compare(self, inputs: dict[str, Tensor], items: Items) -> None:
        """Whether the split model gives what the whole one does, on the first example."""
        self._is_compared = True
        first = next(split_examples(inputs, items.num_examples, 1))
        with self.context(), evaluating(self.model):
            whole = self.model(**first).logits
            features = head_features(self.model, self._head, first)
            if features.shape[:-1] != whole.shape[:-1]:
                self._run_whole("it picks tokens after its output layer")
                return
            split = self.after_head(self._head(features))
        eps = max(torch.finfo(whole.dtype).eps, torch.finfo(features.dtype).eps)
        largest = whole.abs().nan_to_num(0, 0, 0).max().clamp_min(1)
        tolerance = 16 * eps * float(largest)
        if not torch.allclose(whole, split.to(whole.dtype), rtol=0, atol=tolerance, equal_nan=True):
            self._run_whole("its logits are not those of its output layer")

    def _run_whole(self, why: str) -> None:
        self._head, self._why = None, why
