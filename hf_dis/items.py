"""The items of a batch: its examples, or those of its tokens that are supervised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Items:
    """What is distilled of a batch of B examples; ``N`` items.

    Attributes:
        num_examples: B.
        labels: the class of each item, ``[N]``, or None.
        positions: where the items are among the ``B·S`` tokens, ascending, ``[N]``; None where each example is an item.
        length: S, tokens an example; 1 where each example is an item.
        targets: what a cache of teacher targets holds of each item, uint8 ``[N, bytes]``; None without one.
    """

    num_examples: int
    labels: Tensor | None = None
    positions: Tensor | None = None
    length: int = 1
    targets: Tensor | None = None

    def __len__(self) -> int:
        return self.num_examples if self.positions is None else len(self.positions)

    def of(self, values: Tensor, chunk: slice = slice(None)) -> Tensor:
        """The values of all items, or of some: ``[N, ...]`` of ``[B, ...]`` or, with positions, ``[B, S, ...]``.

        Raises:
            ValueError: if a model answers for more or fewer tokens than it was given.
        """
        if self.positions is None:
            return values[chunk]
        if values.shape[:2] != (self.num_examples, self.length):
            raise ValueError(
                f"a model answers for {tuple(values.shape[:2])} tokens of {(self.num_examples, self.length)} that it "
                "was given: which answer is about which token cannot be told. Prompt learning adds tokens: use LoRA"
            )
        return values.flatten(0, 1)[self.positions[chunk]]

    def sums_by_example(self, values: Tensor) -> Tensor:
        """Sums of a value an item, ``[N]``, over each example: ``[B]``."""
        if self.positions is None:
            return values
        return values.new_zeros(self.num_examples).index_add_(0, self.positions // self.length, values)


def token_items(labels: Tensor | None, mask: Tensor | None, shape: torch.Size, shifts_labels: bool) -> Items:
    """The supervised tokens of a batch of sequences.

    Args:
        labels: class ids ``[B, S]``, -100 where there is none; or None.
        mask: ``[B, S]``, 0 at padding; looked at where there are no labels. None: there is no padding.
        shape: (B, S).
        shifts_labels: whether the model's answer at a token is about the next one, as a causal language model's is.

    Raises:
        ValueError: if labels are not ``[B, S]``, or a sequence is too short to have a next token.
    """
    num_examples, length = shape
    if labels is not None and labels.shape != shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for tokens of shape {tuple(shape)}: there has to be one class "
            f"id a token, {IGNORED} where there is none"
        )
    if labels is None:
        supervised = torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0
    else:
        if shifts_labels:
            if length < 2:
                raise ValueError(
                    "the sequences have length 1: a causal language model learns to tell the next token, so they have "
                    "to be of two tokens or more"
                )
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        supervised = labels != IGNORED
    positions = supervised.flatten().nonzero()[:, 0]
    return Items(num_examples, None if labels is None else labels.flatten()[positions], positions, length)


def split_examples(inputs: dict[str, Tensor], num_examples: int, chunk_examples: int) -> Iterator[dict[str, Tensor]]:
    """Splits model inputs into chunks of examples; what does not have one entry for each is passed whole."""
    for start in range(0, num_examples, chunk_examples):
        yield {
            name: value[start : start + chunk_examples]
            if isinstance(value, Tensor) and value.dim() and len(value) == num_examples
            else value
            for name, value in inputs.items()
        }


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Checks that class ids are within 0..C-1; on an accelerator this waits for the device.

    Raises:
        ValueError: names the ids that are not, or that they are no whole numbers.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: they have to be class ids, whole numbers 0..{num_classes - 1}")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"labels {labels[outside].unique().tolist()[:10]} are outside 0..{num_classes - 1}: teacher and student "
            f"share {num_classes} classes; check num_labels, or the tokenizer, and the label column"
        )
