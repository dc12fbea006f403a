"""LogitStream: a model's logits in chunks of items, so that all logits never exist at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.utils import logging

from hf_dis.items import Items, first_examples, split_examples
from hf_dis.models.after_head import AfterHead
from hf_dis.models.gathered import gathered
from hf_dis.models.head_features import evaluating, head_features
from hf_dis.models.head_search import find_head
from hf_dis.models.tasks import base_model
from hf_dis.precision import product_type
from hf_dis.teacher import targets

logger = logging.get_logger(__name__)


class LogitStream:
    """Computes the logits of a model's items chunk by chunk, without gradient.

    Where the output layer can be found, the model runs once, up to that layer. The layer is then applied
    to chunks of items, so memory is that of one chunk. The first batch compares this with the whole model.
    Otherwise the whole model runs on chunks of examples.

    The model may be offloaded or spread over devices: the logits are on the device of the inputs.

    Args:
        model: any model that returns ``.logits``, ``[B, C]`` or ``[B, S, C]``.
        num_outputs: classes of the output layer.
        chunk_items: items per chunk; None: as :func:`hf_dis.teacher.targets.chunk_items` chooses for the device.
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
        self.num_outputs, self.chunk_items = num_outputs, chunk_items
        self._head: nn.Module | None = None
        self._why: str | None = None
        self._is_compared = False
        if hasattr(base_model(model), "config"):
            try:
                self._head = model.get_submodule(find_head(model, num_outputs))
            except ValueError as error:
                self._run_whole(str(error))

    @property
    def after_head(self) -> AfterHead:
        """The operations after the output layer, read at each call: moving a model replaces its buffers."""
        return AfterHead.of(base_model(self.model))

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], items: Items, chunks: int | None = None) -> Iterator[Tensor]:
        """Yields the logits of the items in order, ``[n, C]`` per chunk; without items one empty chunk.

        Args:
            inputs: of the model, without labels.
            items: the items wanted.
            chunks: as for :meth:`items_of_chunk`.
        """
        if not self.splits(inputs, items):
            if self._why is not None:
                logger.warning_once(
                    f"{type(self.model).__name__} cannot be split before its output layer ({self._why}): it runs on "
                    "chunks of examples, whose logits exist at the same time"
                )
            return self._by_examples(inputs, items, chunks)
        features = self.features(inputs, items)
        with self.context():
            weights = _cast(self._head, features.device)
        parts = features.split(self.items_of_chunk(len(items), features.device, chunks))
        return (self.of_features(part, weights) for part in parts)

    @torch.no_grad()
    def features(self, inputs: dict[str, Tensor], items: Items) -> Tensor:
        """The input of the output layer for the items, ``[N, d]``, of a model that :meth:`splits`.

        Args:
            inputs: of the model, without labels.
            items: the items wanted.
        """
        with self.context():
            features = head_features(self.model, self._head, self._brought(inputs)).to(_device(inputs))
            if not isinstance(self._head, nn.Linear):
                return items.of(features)
            # In the type of the products, once, where autocast would cast each chunk.
            if items.positions is not None:
                return gathered(items.tokens_of(features), items.positions)
            return items.of(features).to(product_type(features))

    def items_of_chunk(self, num_items: int, device: torch.device, chunks: int | None = None) -> int:
        """Counts the items of a chunk.

        Args:
            num_items: of the batch.
            device: of the logits.
            chunks: the most of them on an accelerator, where the number of items per chunk is not set; None: as for
                :func:`hf_dis.teacher.targets.chunk_items`.
        """
        return self.chunk_items or targets.chunk_items(num_items, self.num_outputs, device, chunks)

    @torch.no_grad()
    def splits(self, inputs: dict[str, Tensor], items: Items) -> bool:
        """Returns True if the model can be split before its output layer.

        The first call compares the logits of one example.

        Args:
            inputs: of the model, without labels.
            items: of the batch.
        """
        if self._head is not None and not self._is_compared:
            self._compare(inputs, items)
        return self._head is not None

    @torch.no_grad()
    def of_features(self, features: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Computes the logits ``[n, C]`` for the input of the output layer, ``[n, d]``, on the same device.

        Args:
            features: input of the output layer.
            weights: take the place of parameters of the output layer, by name.
        """
        with self.context():
            here = features.to(_weights_device(self._head, features.device))
            logits = self.after_head(functional_call(self._head, weights, here) if weights else self._head(here))
        return logits.to(features.device)

    def _by_examples(self, inputs: dict[str, Tensor], items: Items, chunks: int | None) -> Iterator[Tensor]:
        num_answers = items.num_examples * items.length
        chunk_examples = max(1, self.items_of_chunk(num_answers, _device(inputs), chunks) // items.length)
        first_position = 0
        for chunk in split_examples(inputs, items.num_examples, chunk_examples):
            with torch.no_grad(), self.context():
                logits = self.model(**self._brought(chunk)).logits.to(_device(inputs))
            if items.positions is not None:
                num_examples = len(logits)
                here = items.positions - first_position
                here = here[(here >= 0) & (here < num_examples * items.length)]
                logits = Items(num_examples, positions=here, length=items.length).of(logits)
                first_position += num_examples * items.length
            yield logits
            del logits

    def _compare(self, inputs: dict[str, Tensor], items: Items) -> None:
        """Compares the split model with the whole model on the first example."""
        self._is_compared = True
        if self.after_head.bias is not None and self.after_head.bias.is_meta:
            self._run_whole("the bias after its output layer is offloaded")
            return
        device = _device(inputs)
        first = self._brought(first_examples(inputs, items, 1))
        with self.context(), evaluating(self.model):
            whole = self.model(**first).logits.to(device)
            features = head_features(self.model, self._head, first).to(device)
        if not features.is_floating_point():
            self._run_whole("its output layer is its embedding")
            return
        if features.shape[:-1] != whole.shape[:-1]:
            self._run_whole("it picks tokens after its output layer")
            return
        split = self.of_features(features)
        eps = max(torch.finfo(whole.dtype).eps, torch.finfo(features.dtype).eps)
        largest = whole.abs().nan_to_num(0, 0, 0).max().clamp_min(1)
        tolerance = 16 * eps * float(largest)
        if not torch.allclose(whole, split.to(whole.dtype), rtol=0, atol=tolerance, equal_nan=True):
            self._run_whole("its logits are not those of its output layer")

    def _run_whole(self, why: str) -> None:
        self._head, self._why = None, why

    def _brought(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Brings inputs to the model's device; the hooks of an offloaded model bring them by themselves."""
        device = _weights_device(self.model, _device(inputs))
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _cast(head: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Casts the parameters of a plain linear layer once, where autocast would cast the parameters for each chunk.

    Autocast keeps no copy of a frozen parameter: a head of 151,936 x 2,048 would move 1.9 GB per chunk.
    """
    parameters = dict(head.named_parameters())
    is_offloaded = any(value.is_meta for value in parameters.values())
    if type(head) is not nn.Linear or is_offloaded or not torch.is_autocast_enabled(device.type):
        return {}
    dtype = torch.get_autocast_dtype(device.type)
    return {name: value.to(dtype) for name, value in parameters.items() if value.dtype == torch.float32}


def _device(inputs: dict[str, Tensor]) -> torch.device:
    return next(value for value in inputs.values() if isinstance(value, Tensor)).device


def _weights_device(module: nn.Module, default: torch.device) -> torch.device:
    """Returns the device of a module's weights, or a default where there are none or they are offloaded."""
    first = next(module.parameters(), None)
    return default if first is None or first.is_meta else first.device
