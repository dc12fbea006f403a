"""Keys of examples in a cache of teacher targets: hashes of exactly the inputs that the teacher was given.

A target belongs to an input, not to a place in a dataset. Order, shuffling, subsets, sampling by length, several
processes and dataloader workers therefore need no bookkeeping. An input that the teacher has not seen is not found:
one of a different dataset, of a different tokenizer, or with a random augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from hf_dis.errors import DataError
from hf_dis.items import IGNORED

# Tells the sequences of a packed example apart, as TRL's padding-free collator does beside position_ids.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Inputs left out of a key: masks select the tokens that count, and the rest follows from labels or position_ids.
NO_KEY = ("attention_mask", "decoder_attention_mask", "decoder_input_ids", "label", "label_ids", *PACKING)


def key_inputs(batch: Mapping[str, Any]) -> list[str]:
    """Names the inputs of a batch that make up a key, in alphabetical order.

    Labels are part of a key where they are a class per token: they mark the supervised tokens.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name not in NO_KEY}
    return sorted(name for name, value in tensors.items() if name != "labels" or value.dim() > 1)


def content_keys(batch: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    """Computes a signed 64-bit key for each example of a batch on the CPU.

    Padding is left out. An input with the shape of ``attention_mask`` counts where the mask is not 0. Labels count
    from the first to the last supervised token, together with the place of the first one.

    Args:
        batch: as collated; the tensors in ``names`` are ``[B, ...]``.
        names: inputs that make up the keys.

    Returns:
        B keys.

    Raises:
        DataError: if the batch lacks an input of ``names``, or the inputs are of different numbers of examples.
    """
    missing = [name for name in names if name not in batch]
    if missing:
        raise DataError(
            f"the cache's keys are made of {', '.join(names)}, and the batch has no {', '.join(missing)} (it has "
            f"{', '.join(batch)}): collate the same inputs as when the cache was written"
        )
    lengths = {name: len(batch[name]) for name in names}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"the inputs of a batch have different numbers of examples, {lengths}: each input needs one entry per "
            "example"
        )
    keys = []
    for example in zip(*(_parts(name, batch) for name in names), strict=True):
        digest = xxhash.xxh3_64()
        for described, content in example:
            digest.update(described)
            digest.update(content)
        keys.append(digest.intdigest() - 2**63)
    return keys


def is_joined(batch: Mapping[str, Any], names: Sequence[str], num_examples: int) -> bool:
    """Returns True if a collator has joined several examples into one, as a padding-free collator does.

    Args:
        batch: as collated.
        names: inputs that make up the keys.
        num_examples: the number of examples that were collated.
    """
    return num_examples > 1 and {len(batch[name]) for name in names if name in batch} == {1}


def restarts(batch: Mapping[str, Any]) -> bool:
    """Returns True if an example of the batch packs several sequences: its position_ids, ``[B, S]``, restart."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is None or positions.dim() != 2:
        return False
    starts = positions == 0
    if mask is not None and mask.shape == positions.shape:
        starts = starts & mask.bool()  # the collator pads positions with 0 too
    return bool((starts.sum(1) > 1).any())


def _parts(name: str, batch: Mapping[str, Any]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields the part of each example's key that comes from an input: name, type and shape; then the bytes."""
    values, mask = batch[name], batch.get("attention_mask")
    if name == "labels":
        yield from _label_parts(values, batch.get("decoder_attention_mask", mask))
    elif mask is not None and values.shape[: mask.dim()] == mask.shape:
        for value, marked in zip(values, mask.bool(), strict=True):
            yield _described(name, value[marked]), _bytes(value[marked])
    else:  # all examples have one shape, so their bytes are taken at once
        described = _described(name, values[0])
        yield from ((described, content) for content in _bytes(values).reshape(len(values), -1))


def _label_parts(labels: Tensor, mask: Tensor | None) -> Iterator[tuple[bytes, np.ndarray]]:
    """Yields name, type, shape and place of each example's supervised span; then the bytes of its labels.

    The place is counted from the first token that the mask marks, so that padding on the left has no effect. Without a
    mask of the labels' shape the place is counted from the start.
    """
    is_masked = mask is not None and mask.shape == labels.shape
    starts = mask.bool().int().argmax(1).tolist() if is_masked else [0] * len(labels)
    for value, start in zip(labels, starts, strict=True):
        (supervised,) = (value != IGNORED).nonzero(as_tuple=True)
        first, end = (int(supervised[0]), int(supervised[-1]) + 1) if len(supervised) else (start, start)
        # A decoder's labels may by chance have the shape of the encoder's mask, and start before the marked tokens.
        place = max(0, first - start)
        yield _described("labels", value[first:end]) + f" from {place}".encode(), _bytes(value[first:end])


def _described(name: str, value: Tensor) -> bytes:
    return f"{name} {value.dtype} {tuple(value.shape)}".encode()


def _bytes(value: Tensor) -> np.ndarray:
    return value.contiguous().view(-1).view(torch.uint8).numpy()
