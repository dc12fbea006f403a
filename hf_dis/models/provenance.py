"""Names and digests that identify a teacher, its classes and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dis.models.spread import whole


def known_as(model: nn.Module) -> tuple[str | None, str | None]:
    """Returns name and revision of a transformers model, None where unknown; a local directory gives its last part."""
    if not isinstance(model, PreTrainedModel):
        return None, None
    name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    if name and (Path(name).is_absolute() or Path(name).is_dir()):
        name = f"{Path(name).resolve().name} (a local directory)"
    return name or None, revision


def class_name(model: nn.Module) -> str:
    """Returns the name of a model's class, without the class that FSDP2 derives from it."""
    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def hub_name(model: nn.Module) -> str | None:
    """Returns the name on the Hub that a model was loaded by; None for a local directory and for a new model."""
    name, revision = known_as(model)
    return name if is_hub_name(name, revision) else None


def is_hub_name(name: str | None, revision: str | None) -> bool:
    """Returns True if a name of :func:`known_as` is one of the Hub: with an owner, or known by its commit.

    Args:
        name, revision: of a model.
    """
    if name is None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:  # the name of a local directory
        return False
    return "/" in name or revision is not None


def known_license(model: nn.Module) -> dict[str, str]:
    """Finds the licence of the checkpoint that a model was loaded from, as a model card states it.

    The card of the checkpoint is read, in its directory or on the Hub, and the configuration where the card has none.
    A Hub that cannot be reached counts as a card without a licence.

    Args:
        model: of transformers, or any other, whose licence is not known.

    Returns:
        ``license``, and ``license_name`` and ``license_link`` where the card has them; empty if it is not known.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    card = _card_of(model)
    if not isinstance(card.get("license"), str):
        named = model.config.to_dict().get("license")
        return {"license": named} if isinstance(named, str) and named else {}
    found = {key: card[key] for key in ("license", "license_name", "license_link") if isinstance(card.get(key), str)}
    link, name = found.get("license_link"), hub_name(model)
    if link is not None and "://" not in link:  # a file beside that card
        found.pop("license_link")
        if name is not None:
            found["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return found


def _card_of(model: PreTrainedModel) -> dict[str, Any]:
    """The metadata of the card of a model's checkpoint; empty without a card."""
    folder, (name, revision) = Path(model.config._name_or_path or ""), known_as(model)
    try:
        if model.config._name_or_path and folder.is_dir():
            return metadata_load(folder / "README.md") or {}
        if is_hub_name(name, revision):
            return metadata_load(hf_hub_download(name, "README.md", revision=revision)) or {}
    except (OSError, ValueError, HTTPError, yaml.YAMLError):  # no card, a damaged one, or no network
        return {}
    return {}


def stored_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields names and values of a model's state, with the values that accelerate has offloaded read from its hooks.

    A tensor on the meta device that no hook keeps is yielded as it is.

    Args:
        model: the model, offloaded in part or not.
    """
    kept = dict(_offloaded(model))
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            yield name, (_read(kept, name, value) if value.is_meta else value).detach()


class StoredValue(NamedTuple):
    """A value of a model's state: name, type and shape of the whole, and its rows in parts, in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]


def weights_digest(model: nn.Module) -> str:
    """Computes xxh3_128 of a model's parameters and buffers, with their names, types and shapes.

    The digest of a model that is offloaded, or that FSDP2 shards, is that of the same model in memory. Every process
    has to call it for the latter.
    """
    values = sorted(stored_values(model), key=lambda named: named[0])
    return digest_of(StoredValue(name, one.dtype, tuple(one.shape), [whole(one)]) for name, one in values)


def digest_of(values: Iterable[StoredValue]) -> str:
    """Computes the digest of :func:`weights_digest` from the values of a model.

    Args:
        values: sorted by name; a value on the meta device counts by its name, type and shape.
    """
    digest = xxhash.xxh3_128()
    for name, dtype, shape, parts in values:
        digest.update(f"{name} {dtype} {shape}".encode())
        for part in parts:
            if not part.is_meta:
                digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def labels_digest(model: nn.Module) -> str | None:
    """Computes sha256 of the class names in a model's configuration; None if the classes have no names."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
        return None
    return hashlib.sha256(json.dumps(sorted(names.items())).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Computes sha256 of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _offloaded(model: nn.Module) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yields the modules whose values accelerate keeps elsewhere, by name, with its map of their values."""
    for name, module in model.named_modules():
        hook = module.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):  # several in a SequentialHook
            values = getattr(one, "weights_map", None)
            if values is not None:
                yield name, values


def _read(kept: Mapping[str, Mapping[str, Tensor]], name: str, value: Tensor) -> Tensor:
    """Reads a value from the hook of its module, or of the next module around that has the value."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module, local = ".".join(parts[:depth]), ".".join(parts[depth:])
        try:
            return kept[module][local]
        except KeyError:
            continue
    return value
