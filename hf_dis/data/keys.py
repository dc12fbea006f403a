"""What an example is known by in a cache of teacher targets: a hash of exactly what the teacher was given of it.

A target so belongs to one input, not to a place in a data set: order, shuffling, subsets, sampling by length, several
processes and workers need no bookkeeping, and an input that the teacher has not seen (another data set, another
tokenizer, an augmentation at random) is not found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from hf_dis.data.errors import DataError
from hf_dis.rows import IGNORED

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
        DataError: if the batch lacks one of them.
    """
    missing = [name for name in names if name not in batch]
    if missing:
        raise DataError(
            f"the cache's keys are made of {', '.join(names)}, and the batch has no {', '.join(missing)} (it has "
            f"{', '.join(batch)}): collate the same inputs as when the cache was written"
        )
    mask = batch.get("attention_mask")
    keys = []
    for row in range(len(batch[names[0]])):
        digest = xxhash.xxh3_64()
        for name in names:
            value = batch[name][row]
            if name == "labels":
                (supervised,) = (value != IGNORED).nonzero(as_tuple=True)
                value = value[supervised[0] : supervised[-1] + 1] if len(supervised) else value[:0]
            elif mask is not None and value.shape[: mask.dim() - 1] == mask[row].shape:
                value = value[mask[row].bool()]
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
        keys.append(digest.intdigest() - 2**63)
    return keys
