"""LogitStream: a model's logits in chunks of items, so that all logits never exist at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.utils import logging

from hf_dis.items import Items, first_examples, split_examples
from hf_dis.models.after_head import AfterHead
from hf_dis.models.gathered import gathered
from hf_dis.models.head_features import evaluating, head_features
from hf_dis.models.head_search import find_head
from hf_dis.models.spread import is_fully_sharded, is_gathered_by_fsdp, is_true_anywhere, reshard
from hf_dis.models.tasks import base_model
from hf_dis.precision import product_type
from hf_dis.teacher import targets

logger = logging.get_logger(__name__)

# Applies an output layer to its input, [n, d]; gives [n, C].
Head = Callable[[Tensor], Tensor]


class LogitStream:
    """Computes the logits of a model's items chunk by chunk, without gradient.

    Where the output layer can be found, the model runs once, up to that layer. The layer is then applied
    to chunks of items, so memory is that of one chunk. The first batch compares this with the whole model.
    Otherwise the whole model runs on chunks of examples.

    The model may be offloaded or spread over devices: the logits are on the device of the inputs.

    A model that FSDP2 shards has to be asked by every process. Each process runs the model once per call, whatever
    its items are. The output layer is gathered in that forward, and held until the last chunk.

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

        Raises:
            ValueError: if FSDP2 shards a model that cannot be split before its output layer.
        """
        if not self.splits(inputs, items):
            if is_fully_sharded(self.model):
                raise ValueError(
                    f"FSDP has sharded the teacher, a {type(self.model).__name__} that cannot be split before its "
                    f"output layer ({self._why or 'it is not of transformers'}): the processes would run it different "
                    "numbers of times. Load the teacher whole, or train from a cache of its targets"
                )
            if self._why is not None:
                logger.warning_once(
                    f"{type(self.model).__name__} cannot be split before its output layer ({self._why}): it runs on "
                    "chunks of examples, whose logits exist at the same time"
                )
            return self._by_examples(inputs, items, chunks)
        features, head = self._at_head(inputs)
        features = self._of_items(features, items)
        if head is None:
            with self.context():
                head = _cast(self._head, features.device)
        parts = features.split(self.items_of_chunk(len(items), features.device, chunks))
        return (self.of_features(part, head) for part in parts)

    @torch.no_grad()
    def features(self, inputs: dict[str, Tensor], items: Items) -> Tensor:
        """The input of the output layer for the items, ``[N, d]``, of a model that :meth:`splits`.

        Args:
            inputs: of the model, without labels.
            items: the items wanted.
        """
        return self._of_items(self._at_head(inputs)[0], items)

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
    def of_features(self, features: Tensor, head: Head | None = None) -> Tensor:
        """Computes the logits ``[n, C]`` for the input of the output layer, ``[n, d]``, on the same device.

        Args:
            features: input of the output layer.
            head: takes the place of the output layer.
        """
        with self.context():
            here = features.to(_weights_device(self._head, features.device))
            logits = self.after_head((head or self._head)(here))
        return logits.to(features.device)

    def _at_head(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Head | None]:
        """The input of the output layer for all tokens, and a copy of the layer where FSDP2 gathers it.

        One gathering serves all chunks. Calls of the layer itself would gather it for each of them, and processes
        have different numbers of chunks.
        """
        is_gathered = is_fully_sharded(self.model) and is_gathered_by_fsdp(self.model, self._head)
        with self.context(), _copied(self._head) if is_gathered else nullcontext() as copied:
            features = head_features(self.model, self._head, self._brought(inputs)).to(_device(inputs))
        if is_gathered:
            reshard(self.model)  # FSDP2 keeps the unit of the root whole until a backward
        return features, copied

    def _of_items(self, features: Tensor, items: Items) -> Tensor:
        """The features of the items, for those of all tokens."""
        with self.context():
            if not isinstance(self._head, nn.Linear):
                return items.of(features)
            # In the type of the products, once, where autocast would cast each chunk.
            if items.positions is not None:
                return gathered(items.tokens_of(features), items.positions)
            return items.of(features).to(product_type(features))

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
        """Compares the split model with the whole model on the first example.

        Processes have different examples. If FSDP2 shards the model, a difference on one process counts for all.
        """
        self._is_compared = True
        why = self._difference(inputs, items)
        if is_fully_sharded(self.model) and is_true_anywhere(why is not None, self.model):
            why = why or "its logits are not those of its output layer on another process"
        if why is not None:
            self._run_whole(why)

    def _difference(self, inputs: dict[str, Tensor], items: Items) -> str | None:
        """The reason for which the model cannot be split; None: it can."""
        if self.after_head.bias is not None and self.after_head.bias.is_meta:
            return "the bias after its output layer is offloaded"
        device, first = _device(inputs), self._brought(first_examples(inputs, items, 1))
        with self.context(), evaluating(self.model):
            whole = self.model(**first).logits.to(device)
        features, head = self._at_head(first)
        if head is not None and not _is_plain_linear(self._head):
            return f"its output layer is a {type(self._head).__name__}"
        if not features.is_floating_point():
            return "its output layer is its embedding"
        if features.shape[:-1] != whole.shape[:-1]:
            return "it picks tokens after its output layer"
        split = self.of_features(features.to(device), head)
        eps = max(torch.finfo(whole.dtype).eps, torch.finfo(features.dtype).eps)
        largest = whole.abs().nan_to_num(0, 0, 0).max().clamp_min(1)
        tolerance = 16 * eps * float(largest)
        if not torch.allclose(whole, split.to(whole.dtype), rtol=0, atol=tolerance, equal_nan=True):
            return "its logits are not those of its output layer"
        return None

    def _run_whole(self, why: str) -> None:
        self._head, self._why = None, why

    def _brought(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Brings inputs to the model's device; the hooks of an offloaded model bring them by themselves."""
        device = _weights_device(self.model, _device(inputs))
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@contextmanager
def _copied(layer: nn.Module) -> Iterator[Head]:
    """Copies the parameters of a linear layer when it runs within a context, in the type of the product.

    FSDP2 frees the parameters that it has gathered after the forward.

    Yields:
        the layer of the copied parameters, once there are any.
    """
    copies: dict[str, Tensor] = {}

    def copy(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        dtype = product_type(args[0])
        copies.update({name: value.detach().to(dtype, copy=True) for name, value in module.named_parameters()})

    def linear(features: Tensor) -> Tensor:
        return F.linear(features.to(copies["weight"].dtype), copies["weight"], copies.get("bias"))

    hook = layer.register_forward_pre_hook(copy)
    try:
        yield linear
    finally:
        hook.remove()


def _is_plain_linear(layer: nn.Module) -> bool:
    """Returns True if a layer computes ``h Wᵀ + b`` from parameters of its own and nothing else."""
    return type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)


def _cast(head: nn.Module, device: torch.device) -> Head:
    """Casts the parameters of a plain linear layer once, where autocast would cast the parameters for each chunk.

    Autocast keeps no copy of a frozen parameter: a head of 151,936 x 2,048 would move 1.9 GB per chunk.
    """
    parameters = dict(head.named_parameters())
    is_offloaded = any(value.is_meta for value in parameters.values())
    if type(head) is not nn.Linear or is_offloaded or not torch.is_autocast_enabled(device.type):
        return head
    dtype = torch.get_autocast_dtype(device.type)
    cast = {name: value.to(dtype) for name, value in parameters.items() if value.dtype == torch.float32}
    return partial(functional_call, head, cast)


def _device(inputs: dict[str, Tensor]) -> torch.device:
    return next(value for value in inputs.values() if isinstance(value, Tensor)).device


def _weights_device(module: nn.Module, default: torch.device) -> torch.device:
    """Returns the device of a module's weights, or a default where there are none or they are offloaded."""
    first = next(module.parameters(), None)
    return default if first is None or first.is_meta else first.device
