"""What an example is known by in a cache of teacher targets: a hash of exactly what the teacher was given of it.

A target so belongs to one input, not to a place in a data set: order, shuffling, subsets, sampling by length, several
processes and workers need no bookkeeping, and an input that the teacher has not seen (another data set, another
tokenizer, an augmentation at random) is not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from hf_dis.errors import DataError
from hf_dis.items import IGNORED

# What is left out: masks say which tokens count, and these are made from the labels.
NO_KEY = ("attention_mask", "decoder_attention_mask", "decoder_input_ids", "label", "label_ids")


def key_inputs(batch: Mapping[str, Tensor]) -> list[str]:
    """Names of what an example's key is made of: all inputs, and labels where they are a class a token, since they say
    which tokens are supervised."""
    return sorted(name for name in batch if name not in NO_KEY and (name != "labels" or batch[name].dim() > 1))


def content_keys(batch: Mapping[str, Tensor], names: Sequence[str]) -> list[int]:
    """A signed 64-bit key for each example of a batch on the CPU.

    Padding is left out: of a value with the shape of the row's ``attention_mask`` only what it marks counts, of labels
    what lies between the first and the last that is not -100.

    Args:
        batch: as collated, tensors with a row for each example.
        names: of the inputs that the key is made of.

    Raises:
        DataError: if the batch lacks one of them, or they have not one row an example.
    """
    missing = [name for name in names if name not in batch]
    if missing:
        raise DataError(
            f"the cache's keys are made of {', '.join(names)}, and the batch has no {', '.join(missing)} (it has "
            f"{', '.join(batch)}): collate the same inputs as when the cache was written"
        )
    lengths = {name: len(batch[name]) for name in names}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the inputs of a batch have different numbers of rows, {lengths}: each needs one an example")
    mask = batch.get("attention_mask")
    parts = [_parts(name, batch[name], mask) for name in names]
    keys = []
    for row in zip(*parts, strict=True):
        digest = xxhash.xxh3_64()
        for described, content in row:
            digest.update(described)
            digest.update(content)
        keys.append(digest.intdigest() - 2**63)
    return keys


def _parts(name: str, values: Tensor, mask: Tensor | None) -> Iterator[tuple[bytes, np.ndarray]]:
    """What counts of an input, example by example: its name, type and shape, and its bytes."""
    if name == "labels":
        for value in values:
            (supervised,) = (value != IGNORED).nonzero(as_tuple=True)
            value = value[supervised[0] : supervised[-1] + 1] if len(supervised) else value[:0]
            yield _described(name, value), _bytes(value)
    elif mask is not None and values.shape[: mask.dim()] == mask.shape:
        for value, marked in zip(values, mask.bool(), strict=True):
            yield _described(name, value[marked]), _bytes(value[marked])
    else:  # the same shape for all: at once
        described = _described(name, values[0])
        yield from ((described, content) for content in _bytes(values).reshape(len(values), -1))


def _described(name: str, value: Tensor) -> bytes:
    return f"{name} {value.dtype} {tuple(value.shape)}".encode()


def _bytes(value: Tensor) -> np.ndarray:
    return value.contiguous().view(-1).view(torch.uint8).numpy()
