"""SampledHead: switches a student's output head for the length of a step, and gives it its own forward back.

The head stays the module that it is. Only the forward of the *instance* is replaced while the head is switched. So
parameter names, ties, wrappers, autocast and checkpoints are those of an ordinary model.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dis.head.fsdp_rows import FsdpRows
from hf_dis.head.sampled_forward import Sampled, with_bias
from hf_dis.head.sharded import ShardedHead
from hf_dis.head.tensor_parallel import own_rows, own_shard, sparse_embedding
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.items import Items
from hf_dis.precision import product_type
from hf_dis.sampling.designs import Updates

# The buffer, [1, C], that Bart, Marian, Pegasus and their relatives add to the logits of all classes.
LOGITS_BIAS = "final_logits_bias"


class _AtPositions(NamedTuple):
    """Computes all classes of the items; see :meth:`SampledHead.set_positions`."""

    items: Items

    def __call__(self, layer: nn.Module, features: Tensor) -> Tensor:
        # A model whose head is its embedding calls the module with token ids, and multiplies by the weight elsewhere.
        return _own_forward(layer)(_of_items(self.items, features) if features.is_floating_point() else features)


class _SparseEmbedding:
    """Gives an embedding a row-sparse gradient; its output is the same."""

    def __call__(self, layer: nn.Embedding, ids: Tensor) -> Tensor:
        if own_shard(layer) is not None:
            return sparse_embedding(layer, ids)
        before, layer.sparse = layer.sparse, True
        try:
            return _own_forward(layer)(ids)
        finally:
            layer.sparse = before


class _Holding:
    """Keeps the features of the items; see :meth:`SampledHead.hold`."""

    def __init__(self, items: Items):
        self.items, self.features = items, None

    def __call__(self, layer: nn.Module, features: Tensor) -> Tensor:
        self.features = _of_items(self.items, features)
        return self.features[:, :1]


class _HoldingInTraining(_Holding):
    """Keeps the features with their graph, and the type of the product; see :meth:`SampledHead.hold_in_training`."""

    def __init__(self, items: Items, bias: Tensor | None):
        super().__init__(items)
        self.bias, self.dtype = bias, None

    def __call__(self, layer: nn.Module, features: Tensor) -> Tensor:
        self.dtype = product_type(features)
        if self.dtype == torch.float16:
            logits = _AtPositions(self.items)(layer, features)
            return logits if self.bias is None else logits + self.bias
        self.features = _of_items(self.items, features)
        # Distributed training looks for the parameters in use from the outputs on: a logit leads to all of them.
        weight, bias, _ = own_rows(layer) or (layer.weight, layer.bias, None)
        return F.linear(self.features, weight[:1], None if bias is None else bias[:1])


_Held = TypeVar("_Held", bound=_Holding)


class SampledHead:
    """Switches the linear layers of a student's output head between all classes and some of them.

    Args:
        model: the student.
        names: the layers of its output head among ``model.named_modules()``, as
            :func:`hf_dis.models.head_search.find_head_layers` finds them. The logits have to be linear in the output
            of each layer, where adapters or a second head make several.
        row_sparse: give the parameters sparse gradients of the sampled rows while sampled classes are computed.
        embeddings: names of the embeddings that share the head's weight, as
            :func:`hf_dis.models.ties.find_tied_embeddings` finds them. With ``row_sparse`` their gradient is
            sparse too, in the rows of the input tokens.

    Attributes:
        layers: the layers by name.
        row_sparse: as given.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], row_sparse: bool = False, embeddings: Sequence[str] = ()
    ):
        self._model, self.layers = model, {name: model.get_submodule(name) for name in names}
        self.row_sparse = row_sparse
        self._embeddings = [model.get_submodule(name) for name in embeddings] if row_sparse else []
        self._adds_bias = next((found for name in names if (found := _adds_logits_bias(model, name))), None)

    @property
    def module(self) -> nn.Linear:
        """The head, where it is one layer.

        Raises:
            ValueError: if the head is made of several layers.
        """
        if len(self.layers) > 1:
            raise ValueError(
                f"the output head is made of several layers: {', '.join(self.layers)}, and one layer is expected; "
                "leave the head out of the adapters, or use a student with one head"
            )
        return next(iter(self.layers.values()))

    @property
    def shard(self) -> VocabShard | None:
        """The classes that this process holds of a sharded head; None if every process holds all classes."""
        return next((layer.shard for layer in self.layers.values() if isinstance(layer, ShardedHead)), None)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight ``[C, d]`` of a head of one layer, and all that is added to its logits, ``[C]`` or None.

        Those of a tensor-parallel head are the rows of this process.

        Raises:
            ValueError: if the head is made of several layers.
        """
        rows = own_rows(self.module)
        if rows is not None:
            return rows.weight, rows.bias
        return self.module.weight, with_bias(self.module, self._logits_bias())

    @property
    def spread(self) -> VocabShard | None:
        """The classes that this process holds of a tensor-parallel head; None of any other head."""
        return own_shard(self.module)

    def parameters(self) -> list[nn.Parameter]:
        """Lists the parameters of all layers."""
        return [parameter for layer in self.layers.values() for parameter in layer.parameters()]

    @contextmanager
    def only(self, item_ids: Tensor, tail_ids: Tensor, positions: Tensor | None = None) -> Iterator[None]:
        """Switches the head to the sampled classes within a context; the arguments are those of :meth:`set`.

        Leave the context after backward: activation checkpointing runs the head again in backward.
        """
        self.set(item_ids, tail_ids, positions)
        try:
            yield
        finally:
            self.clear()

    def set(
        self, item_ids: Tensor, tail_ids: Tensor, positions: Tensor | None = None, updates: Updates | None = None
    ) -> None:
        """Switches the head to the sampled classes until :meth:`clear`.

        Args:
            item_ids: classes of each item, ``[N, R]``.
            tail_ids: classes of each tail, ``[G, K_t]``; item i uses tail ``i mod G``.
            positions: places of the items among the ``B·S`` tokens, ``[N]``; the head's output is then
                ``[N, R + K_t]``. None: an item is an example.
            updates: the sample of these classes that update the head; None: all of them.
        """
        self.clear()
        bias = self._take_logits_bias()
        for layer in self.layers.values():
            fsdp = FsdpRows.of(self._model, layer, self.row_sparse and not isinstance(layer, ShardedHead))
            self._switch(layer, Sampled(item_ids, tail_ids, positions, updates, self.row_sparse, bias, fsdp))
            for embedding in [] if fsdp is None else fsdp.embeddings:
                self._switch(embedding, fsdp.embedded)
            bias = None  # added by the first layer alone
        for embedding in self._embeddings:
            if "switched" not in vars(embedding):  # FSDP2 may shard its weight
                self._switch(embedding, _SparseEmbedding())

    def set_positions(self, items: Items) -> None:
        """Switches the head to all classes of the items until :meth:`clear`; its output is then ``[N, C]``.

        A head that is also the model's embedding is left as it is: its output is then ``[B, S, C]``.

        Args:
            items: of the batch; the model raises ValueError if it computes other tokens than those of the batch.
        """
        self.clear()
        for layer in self.layers.values():
            self._switch(layer, _AtPositions(items))

    def hold(self, items: Items) -> _Holding:
        """Switches the head to keep its features and compute no class until :meth:`clear`.

        The model's logits are then ``[N, 1]`` and mean nothing.

        Args:
            items: as for :meth:`set_positions`.

        Returns:
            an object whose ``features`` are those of the items, ``[N, d]``, once the model has run.

        Raises:
            ValueError: if the head is made of several layers.
        """
        return self._hold(_Holding(items))

    def hold_in_training(self, items: Items) -> _HoldingInTraining:
        """Switches the head to keep its features with their graph until :meth:`clear`.

        The model's logits are then those of the first class alone, ``[N, 1]``. In float16 the head computes all
        classes of the items, ``[N, C]``, and keeps nothing.

        Args:
            items: as for :meth:`set_positions`.

        Returns:
            an object whose ``features`` are those of the items, ``[N, d]``, once the model has run; None in float16.
            Its ``dtype`` is that of the product.

        Raises:
            ValueError: if the head is made of several layers.
        """
        return self._hold(_HoldingInTraining(items, self._logits_bias()))

    def clear(self) -> None:
        """Gives the layers their own forward back."""
        if self._adds_bias is not None:
            self._adds_bias.__dict__.pop(LOGITS_BIAS, None)
        # The last one first: each of several layers of a unit of FSDP2 gives the unit the parameters that it found.
        for layer in reversed([*self._embeddings, *self.layers.values()]):
            switched = self._unswitch(layer)
            if isinstance(switched, Sampled) and switched.fsdp is not None:
                for embedding in switched.fsdp.embeddings:
                    self._unswitch(embedding)
                switched.fsdp.release()

    def _hold(self, holding: _Held) -> _Held:
        self.clear()
        self._switch(self.module, holding)
        self._take_logits_bias()  # else the model would spread [N, 1] to all classes
        return holding

    @staticmethod
    def _switch(layer: nn.Module, switched: Callable[[nn.Module, Tensor], Tensor]) -> None:
        # A forward of the instance itself, as the hooks of accelerate put it there, or None.
        layer.__dict__["full_forward"] = layer.__dict__.get("forward")
        layer.switched = switched
        layer.forward = types.MethodType(_switched_forward, layer)

    @staticmethod
    def _unswitch(layer: nn.Module) -> Callable[[nn.Module, Tensor], Tensor] | None:
        state = layer.__dict__
        switched = state.pop("switched", None)
        if switched is not None:
            del state["forward"]
            own = state.pop("full_forward")
            if own is not None:
                state["forward"] = own
        return switched

    def _take_logits_bias(self) -> Tensor | None:
        """Returns the bias ``[C]`` that the model adds to all logits, and leaves the model a zero until :meth:`clear`.

        An attribute of the instance hides the buffer, which stays as it is.
        """
        bias = self._logits_bias()
        if bias is not None:
            self._adds_bias.__dict__[LOGITS_BIAS] = bias.new_zeros(1, 1)
        return bias

    def _logits_bias(self) -> Tensor | None:
        return None if self._adds_bias is None else self._adds_bias._buffers[LOGITS_BIAS][0]


def _own_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of a switched module before it was switched."""
    return layer.__dict__["full_forward"] or types.MethodType(type(layer).forward, layer)


def _of_items(items: Items, features: Tensor) -> Tensor:
    """Selects the features of the items, ``[N, d]``, from ``[B, S, d]``, ``[B·S, d]`` or ``[B, d]``."""
    is_flat = features.dim() == 2 and len(features) == items.num_examples * items.length
    if items.positions is not None and is_flat:
        return features[items.positions]
    return items.of(features)


def _adds_logits_bias(model: nn.Module, head_name: str) -> nn.Module | None:
    """Finds the module around the head that adds a bias to all logits (Bart and its descendants), if there is one."""
    parents = head_name.split(".")[:-1]
    around = (model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents), -1, -1))
    return next((module for module in around if LOGITS_BIAS in module._buffers), None)


@torch.compiler.disable(reason="the items and the classes of a step are data")
def _switched_forward(layer: nn.Module, features: Tensor) -> Tensor:
    return layer.switched(layer, features)
