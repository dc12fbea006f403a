"""By what a teacher, its classes and its tokenizer are recognised: names and digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import xxhash
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def known_as(model: nn.Module) -> tuple[str | None, str | None]:
    """Name and revision of a transformers model, as far as known; of a local directory only its own name."""
    if not isinstance(model, PreTrainedModel):
        return None, None
    name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    if name and (Path(name).is_absolute() or Path(name).is_dir()):
        name = f"{Path(name).resolve().name} (a local directory)"
    return name or None, revision


def weights_digest(model: nn.Module) -> str:
    """xxh3_128 of a model's parameters and buffers, names, types and shapes included: as fast as they are read."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def labels_digest(model: nn.Module) -> str | None:
    """sha256 of the names that a model's configuration gives its classes, None if it does not name them."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
        return None
    return hashlib.sha256(json.dumps(sorted(names.items())).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
