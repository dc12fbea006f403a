"""The student's output head, switched to the drawn classes for the length of a training step.

The head module stays the module it is: only the *instance's* forward is replaced while a draw is set, so parameter
names, ties, wrappers, autocast and checkpoints see an ordinary model, and with no draw set it is one.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .drawn import drawn_columns, drawn_logits
from .sampling import Updates

# The buffer, [1, C], that Bart, Marian, Pegasus and others add to all logits.
LOGITS_BIAS = "final_logits_bias"


class Drawn(NamedTuple):
    """What a switched layer computes; see :meth:`SampledHead.set`."""

    row_ids: Tensor
    shared_ids: Tensor
    positions: Tensor | None
    updates: Updates | None
    row_sparse: bool
    bias: Tensor | None


class SampledHead:
    """A linear output head that can be told to compute drawn classes only.

    Args:
        model: the student.
        names: the linear layers of its output head among ``model.named_modules()``, as
            :func:`hf_dis.head_search.find_head_layers` finds them. Where there are several, because of adapters or a
            second head, the logits have to be linear in the output of each.
        row_sparse: while it is switched, give its parameters sparse gradients, which hold the drawn rows only.
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
    def only(self, row_ids: Tensor, shared_ids: Tensor, positions: Tensor | None = None) -> Iterator[None]:
        """Within this context the head, and so the student, answers for the drawn classes only.

        Leave it after backward: activation checkpointing runs the head a second time there.
        """
        self.set(row_ids, shared_ids, positions)
        try:
            yield
        finally:
            self.clear()

    def set(
        self, row_ids: Tensor, shared_ids: Tensor, positions: Tensor | None = None, updates: Updates | None = None
    ) -> None:
        """Switches the head to the drawn classes.

        Args:
            row_ids: classes of each row, ``[N, R]``.
            shared_ids: classes of each tail, ``[G, K_t]``; row i uses tail ``i mod G``.
            positions: where the rows are among the flattened positions ``[B·S]`` that the head is given, ``[N]``; its
                output is then ``[N, R + K_t]``. None: a row is an example.
            updates: which of the classes update the head; all of them if None.
        """
        bias = self._logits_bias()
        if bias is not None:
            # What the model adds to the logits of all classes is added to those of the drawn ones here. Until then
            # the model finds a zero in its place: an instance's attribute hides the buffer, which stays as it is.
            self._adds_bias.__dict__[LOGITS_BIAS] = bias.new_zeros(1, 1)
        for layer in self.layers.values():
            if "drawn" not in layer.__dict__:
                layer.__dict__["undrawn_forward"] = layer.__dict__.get("forward")
            layer.drawn = Drawn(row_ids, shared_ids, positions, updates, self.row_sparse, bias)
            layer.forward = types.MethodType(_drawn_forward, layer)
            bias = None

    def _logits_bias(self) -> Tensor | None:
        return None if self._adds_bias is None else self._adds_bias._buffers[LOGITS_BIAS][0]

    def clear(self) -> None:
        """Gives the head its own forward back."""
        if self._adds_bias is not None:
            self._adds_bias.__dict__.pop(LOGITS_BIAS, None)
        for layer in self.layers.values():
            state = layer.__dict__
            if state.pop("drawn", None) is not None:
                del state["forward"]
                replaced = state.pop("undrawn_forward")  # an instance's own, as accelerate's hooks put it there
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


@torch.compiler.disable(reason="the rows and the classes of a step are data")
def _drawn_forward(layer: nn.Linear, features: Tensor) -> Tensor:
    drawn = layer.drawn
    row_ids, leading = drawn.row_ids, features.shape[:-1]
    if drawn.positions is not None:
        features = features.reshape(-1, features.shape[-1])[drawn.positions]
    elif len(leading) == 2 and leading[0] == len(row_ids):
        # The model picks one position of each example after the head: all of them answer for its classes.
        return _at_all_positions(layer, features)
    elif leading != row_ids.shape[:1]:
        raise ValueError(
            f"the head {type(layer).__name__} got features of shape {tuple(features.shape)} for {len(row_ids)} rows "
            "of drawn classes: it has to see one feature vector a row, [N, d], or a sequence of them, [N, S, d]"
        )
    return _drawn_logits(layer, features, row_ids)


def _at_all_positions(layer: nn.Linear, features: Tensor) -> Tensor:
    """The classes of each example at all of its positions: ``[B, S, R + K_t]`` for features ``[B, S, d]``."""
    num_rows, length = features.shape[:2]
    # Position by position, the last example as often as it takes for a row's number to tell its tail throughout.
    repeats = -num_rows % len(layer.drawn.shared_ids)
    rows = torch.arange(num_rows + repeats, device=features.device).clamp(max=num_rows - 1)
    flat = features[rows].transpose(0, 1).flatten(0, 1)
    logits = _drawn_logits(layer, flat, layer.drawn.row_ids[rows].repeat(length, 1))
    return logits.unflatten(0, (length, len(rows))).transpose(0, 1)[:num_rows]


def _drawn_logits(layer: nn.Linear, features: Tensor, row_ids: Tensor) -> Tensor:
    drawn = layer.drawn
    bias = _with_bias(layer, drawn.bias)
    return drawn_logits(features, layer.weight, bias, row_ids, drawn.shared_ids, drawn.row_sparse, drawn.updates)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode; then each module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _HeadReached(Exception):
    """Ends a forward once the head has been given its features."""

    def __init__(self, features: Tensor):
        self.features = features


@torch.no_grad()
def head_features(model: nn.Module, head: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the head is given for these inputs, ``[N, d]`` or ``[B, S, d]``, with the model in evaluation mode.

    Nothing after it is computed.

    Args:
        model: a model, not wrapped for several processes.
        head: its output head.
        inputs: without labels.
    """

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _HeadReached(args[0])

    hook = head.register_forward_pre_hook(stop)
    try:
        with _evaluating(model):
            model(**inputs)
    except _HeadReached as reached:
        return reached.features
    finally:
        hook.remove()
    raise ValueError(f"{type(model).__name__} does not call its output head, a {type(head).__name__}")


@torch.no_grad()
def check_head(
    model: nn.Module, head: SampledHead, inputs: dict[str, Tensor], precision: torch.dtype | None = None
) -> None:
    """Compares the switched head with the full one on a few rows; run once, at the first step.

    Args:
        model: the student; it is left as it was, and so is the random state.
        head: its head.
        inputs: a few examples, without labels. Where logits are ``[B, S, C]`` the rows are some of their tokens.
        precision: the narrowest type that the model computes in, if narrower than its logits: they agree to that.

    Raises:
        ValueError: if the student's logits are not those of the head at the same classes: something in the model
            comes after the head, or the wrong layer was taken for it.
        FloatingPointError: if they are NaN or Inf.
    """
    layers = " and ".join(map(repr, head.layers))
    remedy = "another layer comes after it. Name the right head with head_name, or use head_mode='exact'"
    with _evaluating(model), _random_state_kept(next(model.parameters()).device):
        full = model(**inputs).logits
        positions = None
        if full.dim() == 3:
            full = full.flatten(0, 1)
            positions = torch.arange(0, len(full), 1 + len(full) // 8, device=full.device)
            full = full[positions]
        row_ids, shared_ids = _classes_to_compare(*full.shape, full.device)
        try:
            with head.only(row_ids, shared_ids, positions):
                drawn = model(**inputs).logits
        except RuntimeError as error:
            raise ValueError(
                f"{type(model).__name__} cannot go on from the output of {layers} at drawn classes ({error}): {remedy}"
            ) from error
    if not full.isfinite().all():
        raise FloatingPointError(
            f"{type(model).__name__} answers NaN or Inf to the first examples: check these inputs and its weights; "
            "classes that the model masks after its head need head_mode='exact'"
        )
    expected = drawn_columns(full, row_ids, shared_ids)
    tolerance = 8 * torch.finfo(precision or full.dtype).eps * float(full.abs().max().clamp_min(1))
    if drawn.shape != expected.shape or not torch.allclose(drawn, expected, rtol=0, atol=tolerance):
        gap = (
            "shapes differ" if drawn.shape != expected.shape else f"off by up to {(drawn - expected).abs().max():.3g}"
        )
        raise ValueError(
            f"{type(model).__name__} does not return the output of {layers} as its logits ({gap}): {remedy}"
        )


def _classes_to_compare(num_rows: int, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Some classes of each row and some of all, not as many as there are: a bias of all would pass unseen."""
    columns = torch.arange(min(4, num_classes), device=device)
    row_ids = (columns * 7 + torch.arange(num_rows, device=device)[:, None]) % num_classes
    shared_ids = (columns * 3 + 1) % num_classes
    return row_ids, (shared_ids if 2 * len(columns) != num_classes else shared_ids[1:])[None]


def _random_state_kept(device: torch.device) -> AbstractContextManager:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
