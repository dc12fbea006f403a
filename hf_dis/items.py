"""The items of a batch: its examples, or its supervised tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.errors import DataError

# The label of a token that is not supervised.
IGNORED = -100
# The byte that fills up stored targets of examples with fewer items than the longest of their batch.
FILLER = 255
# Bounds of the documents of a whole padding-free sequence; a model without them reads position_ids.
DOCUMENT_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Items:
    """The ``N`` items that are distilled of a batch of B examples.

    Attributes:
        num_examples: B.
        labels: the class of each item, ``[N]``, or None.
        positions: places of the items among the ``B·S`` tokens, ascending, ``[N]``; None where an item is an example.
        length: S, tokens per example; 1 where an item is an example.
        targets: stored teacher targets of each item, uint8 ``[N, bytes]``; None without a cache.
    """

    num_examples: int
    labels: Tensor | None = None
    positions: Tensor | None = None
    length: int = 1
    targets: Tensor | None = None

    def __len__(self) -> int:
        return self.num_examples if self.positions is None else len(self.positions)

    def of(self, values: Tensor, chunk: slice = slice(None)) -> Tensor:
        """Selects the values of all items, or of a slice of the items.

        Args:
            values: of a model, ``[B, ...]``, or ``[B, S, ...]`` where items have positions.
            chunk: the items wanted.

        Returns:
            ``[n, ...]`` for n items.

        Raises:
            ValueError: if a model returns logits of more or fewer tokens than it was given.
        """
        if self.positions is None:
            return values[chunk]
        return self.tokens_of(values)[self.positions[chunk]]

    def tokens_of(self, values: Tensor) -> Tensor:
        """Joins the values of all tokens, among which the positions are: ``[B·S, ...]`` for ``[B, S, ...]``.

        Raises:
            ValueError: as :meth:`of`.
        """
        if values.shape[:2] != (self.num_examples, self.length):
            raise ValueError(
                f"a model returned logits of {tuple(values.shape[:2])} tokens for the "
                f"{(self.num_examples, self.length)} that it was given: every token needs logits, in order. Prompt "
                "learning adds tokens, so use LoRA"
            )
        return values.flatten(0, 1)

    def sums_by_example(self, values: Tensor) -> Tensor:
        """Sums one value per item, ``[N]``, over the items of each example: ``[B]``."""
        if self.positions is None:
            return values
        return values.new_zeros(self.num_examples).index_add_(0, self.positions // self.length, values)


def token_items(
    labels: Tensor | None,
    mask: Tensor | None,
    shape: torch.Size,
    shifts_labels: bool,
    device: torch.device | None = None,
    stored: Tensor | None = None,
    positions: Tensor | None = None,
) -> Items:
    """Finds the supervised tokens of a batch of sequences.

    Waits once for an accelerator, for their number; not with ``positions``, or with neither labels nor a mask.

    Args:
        labels: class ids ``[B, S]``, -100 at tokens that are not supervised; or None.
        mask: ``[B, S]``, 0 at padding; read where there are no labels. None: there is no padding.
        shape: (B, S).
        shifts_labels: the model's answer at a token is about the next token, as in a causal language model.
        device: of the positions where there are neither labels nor a mask; None: the processor.
        stored: the result of a look-up in a cache, uint8 ``[B, most items, bytes]``.
        positions: as this function found them for the same batch on the host, which compared their number with
            ``stored`` too.

    Raises:
        ValueError: if labels are not ``[B, S]``, or a sequence is too short to have a next token.
        DataError: if targets of a different number of items are stored.
    """
    num_examples, length = shape
    shift = int(shifts_labels)
    if labels is not None:
        _check_labels(labels, shape, shifts_labels)
    if positions is None:
        if labels is None and mask is None:
            positions = torch.arange(num_examples * length, device=device)
            targets = None if stored is None else stored_items(stored, len(positions))
        else:
            is_item = mask != 0 if labels is None else F.pad(labels[:, shift:] != IGNORED, (0, shift))
            positions, targets = _found_items(is_item.flatten(), stored)
    elif stored is None or len(positions) == stored.shape[0] * stored.shape[1]:
        targets = None if stored is None else stored.flatten(0, 1)  # no filler
    else:
        targets = _stored_at(stored, true_places(_is_stored(stored), len(positions)))
    # The last token of a sequence is without a next token, and never an item.
    labels = None if labels is None else labels.flatten()[shift:][positions]
    return Items(num_examples, labels, positions, length, targets)


def stored_items(stored: Tensor, number: int | None = None) -> Tensor:
    """Joins the stored items of all examples, without the filler between them; waits for an accelerator.

    Args:
        stored: the result of a look-up in a cache, uint8 ``[B, most items, bytes]``.
        number: N, the number of items that there have to be; None: any.

    Returns:
        ``[N, bytes]``.

    Raises:
        DataError: if the number of items differs.
    """
    found = _stored_at(stored, _is_stored(stored).nonzero()[:, 0])
    if number is not None:
        check_stored_number(len(found), number)
    return found


def _found_items(is_item: Tensor, stored: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The places of the items, and their stored targets, with one wait for an accelerator."""
    if stored is None:
        return is_item.nonzero()[:, 0], None
    is_stored = _is_stored(stored)
    number, found = torch.stack([is_item.sum(), is_stored.sum()]).tolist()
    check_stored_number(found, number)
    return true_places(is_item, number), _stored_at(stored, true_places(is_stored, number))


def _is_stored(stored: Tensor) -> Tensor:
    """Tells stored items from filler, for all examples: bool, ``[B·most items]``."""
    # An item ends with a finite float32; a float32 whose last two bytes are all ones is NaN.
    return (stored[..., -2:] != FILLER).any(-1).flatten()


def _stored_at(stored: Tensor, places: Tensor) -> Tensor:
    return stored.flatten(0, 1).index_select(0, places)


def true_places(mask: Tensor, number: int) -> Tensor:
    """Finds where a mask is true a known number of times; a CUDA device is not waited for.

    Args:
        mask: bool, ``[n]``.
        number: k, the number of places.

    Returns:
        the places in ascending order, ``[k]``.
    """
    # torch implements nonzero_static for processors and CUDA alone.
    has_it = mask.device.type in ("cpu", "cuda")
    return torch.nonzero_static(mask, size=number)[:, 0] if has_it else mask.nonzero()[:, 0]


def check_stored_number(found: int, number: int) -> None:
    """Checks that a cache holds targets of as many items as a batch has.

    Raises:
        DataError: if the numbers differ.
    """
    if found != number:
        raise DataError(
            f"the cache holds targets of {found} items for this batch, and {number} are supervised: mask the labels "
            "as when the cache was written"
        )


def _check_labels(labels: Tensor, shape: torch.Size, shifts_labels: bool) -> None:
    """Checks that there is a label of the answer at each token."""
    if labels.shape != shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for tokens of shape {tuple(shape)}: there has to be one class "
            f"id per token, {IGNORED} where there is none"
        )
    if shifts_labels and shape[1] < 2:
        raise ValueError(
            "the sequences have length 1: a causal language model learns the next token, so the sequences need "
            "two tokens or more"
        )


def split_examples(inputs: dict[str, Tensor], num_examples: int, chunk_examples: int) -> Iterator[dict[str, Tensor]]:
    """Yields model inputs in chunks of examples.

    A value without one entry per example is passed whole.

    Args:
        inputs: of a model.
        num_examples: B.
        chunk_examples: examples per chunk.
    """
    for start in range(0, num_examples, chunk_examples):
        yield {
            name: value[start : start + chunk_examples]
            if isinstance(value, Tensor) and value.dim() and len(value) == num_examples
            else value
            for name, value in inputs.items()
        }


def first_examples(inputs: dict[str, Tensor], items: Items, number: int) -> dict[str, Tensor]:
    """Selects the model inputs of the first examples of a batch.

    A padding-free batch is one sequence, and its documents are the examples.

    Args:
        inputs: of a model.
        items: of the batch.
        number: of examples.
    """
    positions = inputs.get("position_ids")
    is_one_sequence = items.num_examples == 1 and items.positions is not None and "attention_mask" not in inputs
    if not is_one_sequence or positions is None or positions.shape != (1, items.length):
        return next(split_examples(inputs, items.num_examples, number))
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    stop = [*starts, items.length][min(number, len(starts))]
    return {
        name: value[:, :stop] if isinstance(value, Tensor) and value.shape[:2] == positions.shape else value
        for name, value in inputs.items()
        if name not in DOCUMENT_BOUNDS
    }


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Checks that class ids are within 0..C-1; on an accelerator this waits for the device.

    Args:
        labels: class ids, ``[N]``.
        num_classes: C.

    Raises:
        ValueError: if labels are not integers, or are outside 0..C-1; names the ids.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: they have to be class ids, whole numbers 0..{num_classes - 1}")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"labels {labels[outside].unique().tolist()[:10]} are outside 0..{num_classes - 1}: teacher and student "
            f"share {num_classes} classes; check num_labels, or the tokenizer, and the label column"
        )
