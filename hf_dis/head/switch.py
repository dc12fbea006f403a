"""The student's output head, switched to the sampled classes for the length of a training step.

The head module stays the module it is: only the *instance's* forward is replaced while a sample is set, so parameter
names, ties, wrappers, autocast and checkpoints see an ordinary model, and with no sample set it is one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.sampling.designs import Updates

# The buffer, [1, C], that Bart, Marian, Pegasus and others add to all logits.
LOGITS_BIAS = "final_logits_bias"


class _Sampled(NamedTuple):
    """Sampled classes; see :meth:`SampledHead.set`."""

    item_ids: Tensor
    tail_ids: Tensor
    positions: Tensor | None
    updates: Updates | None
    row_sparse: bool
    bias: Tensor | None

    def __call__(self, layer: nn.Linear, features: Tensor) -> Tensor:
        leading = features.shape[:-1]
        if self.positions is not None:
            features = features.reshape(-1, features.shape[-1])[self.positions]
        elif len(leading) == 2 and leading[0] == len(self.item_ids):
            # The model picks one position of each example after the head: all of them answer for its classes.
            return self._at_all_positions(layer, features)
        elif leading != self.item_ids.shape[:1]:
            raise ValueError(
                f"the head {type(layer).__name__} got features of shape {tuple(features.shape)} for "
                f"{len(self.item_ids)} items of sampled classes: it has to get one feature vector per item, [N, d], "
                "or a sequence of them, [N, S, d]"
            )
        return self._logits(layer, features, self.item_ids)

    def _at_all_positions(self, layer: nn.Linear, features: Tensor) -> Tensor:
        """The classes of each example at all of its positions: ``[B, S, R + K_t]`` for features ``[B, S, d]``."""
        num_items, length = features.shape[:2]
        # Position by position, with the last example repeated until the number of an item tells its tail throughout.
        repeats = -num_items % len(self.tail_ids)
        items = torch.arange(num_items + repeats, device=features.device).clamp(max=num_items - 1)
        flat = features[items].transpose(0, 1).flatten(0, 1)
        logits = self._logits(layer, flat, self.item_ids[items].repeat(length, 1))
        return logits.unflatten(0, (length, len(items))).transpose(0, 1)[:num_items]

    def _logits(self, layer: nn.Linear, features: Tensor, item_ids: Tensor) -> Tensor:
        bias = _with_bias(layer, self.bias)
        return sampled_logits(features, layer.weight, bias, item_ids, self.tail_ids, self.row_sparse, self.updates)


class _AtPositions(NamedTuple):
    """All classes of some tokens; see :meth:`SampledHead.set_positions`."""

    positions: Tensor
    bias: Tensor | None

    def __call__(self, layer: nn.Linear, features: Tensor) -> Tensor:
        features = features.reshape(-1, features.shape[-1])[self.positions]
        return F.linear(features, layer.weight, _with_bias(layer, self.bias))


class _Holding:
    """No class; see :meth:`SampledHead.hold`."""

    def __init__(self, positions: Tensor | None):
        self.positions, self.features = positions, None

    def __call__(self, layer: nn.Linear, features: Tensor) -> Tensor:
        if self.positions is not None:
            features = features.reshape(-1, features.shape[-1])[self.positions]
        self.features = features
        return features[:, :1]


class SampledHead:
    """A linear output head that can be told to compute sampled classes only.

    Args:
        model: the student.
        names: the linear layers of its output head among ``model.named_modules()``, as
            :func:`hf_dis.models.head_search.find_head_layers` finds them. Where there are several, because of adapters or a
            second head, the logits have to be linear in the output of each.
        row_sparse: while it is switched, give its parameters sparse gradients, which hold the sampled items only.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], row_sparse: bool = False):
        self.layers = {name: model.get_submodule(name) for name in names}
        self.row_sparse = row_sparse
        self._adds_bias = next((found for name in names if (found := _adds_logits_bias(model, name))), None)

    @property
    def module(self) -> nn.Linear:
        """The head where it is one layer.

        Raises:
            ValueError: if it is not.
        """
        if len(self.layers) > 1:
            raise ValueError(f"the output head is made of several layers: {', '.join(self.layers)}")
        return next(iter(self.layers.values()))

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Of the head where it is one layer: ``[C, d]``, and ``[C]`` or None, with what the model adds to all logits.

        Raises:
            ValueError: if it is not.
        """
        return self.module.weight, _with_bias(self.module, self._logits_bias())

    def parameters(self) -> list[nn.Parameter]:
        """Those of all its layers."""
        return [parameter for layer in self.layers.values() for parameter in layer.parameters()]

    @contextmanager
    def only(self, item_ids: Tensor, tail_ids: Tensor, positions: Tensor | None = None) -> Iterator[None]:
        """Within this context the head, and so the student, answers for the sampled classes only.

        Leave it after backward: activation checkpointing runs the head a second time there.
        """
        self.set(item_ids, tail_ids, positions)
        try:
            yield
        finally:
            self.clear()

    def set(
        self, item_ids: Tensor, tail_ids: Tensor, positions: Tensor | None = None, updates: Updates | None = None
    ) -> None:
        """Switches the head to the sampled classes.

        Args:
            item_ids: classes of each item, ``[N, R]``.
            tail_ids: classes of each tail, ``[G, K_t]``; item i uses tail ``i mod G``.
            positions: where the items are among the flattened positions ``[B·S]`` that the head is given, ``[N]``; its
                output is then ``[N, R + K_t]``. None: an item is an example.
            updates: which of the classes update the head; all of them if None.
        """
        bias = self._take_logits_bias()
        for layer in self.layers.values():
            self._switch(layer, _Sampled(item_ids, tail_ids, positions, updates, self.row_sparse, bias))
            bias = None

    def set_positions(self, positions: Tensor) -> None:
        """Switches the head to all classes of some tokens.

        Args:
            positions: the tokens among the flattened positions ``[B·S]``, ``[N]``; the output is then ``[N, C]``.
        """
        bias = self._take_logits_bias()
        for layer in self.layers.values():
            self._switch(layer, _AtPositions(positions, bias))
            bias = None

    def hold(self, positions: Tensor | None) -> _Holding:
        """Switches the head to keep its features and compute no class; its output is ``[N, 1]`` and means nothing.

        Args:
            positions: as for :meth:`set`.

        Returns:
            an object whose ``features`` are those of the items, ``[N, d]``, once the model has run.
        """
        self._take_logits_bias()
        holding = _Holding(positions)
        self._switch(self.module, holding)
        return holding

    def _take_logits_bias(self) -> Tensor | None:
        """What the model adds to the logits of all classes. The model finds a zero in its place until :meth:`clear`:
        an attribute of the instance hides the buffer, which stays as it is."""
        bias = self._logits_bias()
        if bias is not None:
            self._adds_bias.__dict__[LOGITS_BIAS] = bias.new_zeros(1, 1)
        return bias

    @staticmethod
    def _switch(layer: nn.Linear, switched: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        if "switched" not in layer.__dict__:
            layer.__dict__["full_forward"] = layer.__dict__.get("forward")
        layer.switched = switched
        layer.forward = types.MethodType(_switched_forward, layer)

    def _logits_bias(self) -> Tensor | None:
        return None if self._adds_bias is None else self._adds_bias._buffers[LOGITS_BIAS][0]

    def clear(self) -> None:
        """Gives the head its own forward back."""
        if self._adds_bias is not None:
            self._adds_bias.__dict__.pop(LOGITS_BIAS, None)
        for layer in self.layers.values():
            state = layer.__dict__
            if state.pop("switched", None) is not None:
                del state["forward"]
                replaced = state.pop("full_forward")  # an instance's own, as accelerate's hooks put it there
                if replaced is not None:
                    state["forward"] = replaced


def _adds_logits_bias(model: nn.Module, head_name: str) -> nn.Module | None:
    """The module around the head that adds a bias to its output, if there is one (Bart and its descendants)."""
    parents = head_name.split(".")[:-1]
    around = (model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents), -1, -1))
    return next((module for module in around if LOGITS_BIAS in module._buffers), None)


def _with_bias(layer: nn.Linear, added: Tensor | None) -> Tensor | None:
    if layer.bias is None or added is None:
        return layer.bias if added is None else added
    return layer.bias + added


@torch.compiler.disable(reason="the items and the classes of a step are data")
def _switched_forward(layer: nn.Linear, features: Tensor) -> Tensor:
    return layer.switched(layer, features)
