"""Checkpoints of models whose output head is sharded, in the layout that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_dis.distributed.processes import process_index, wait_for_everyone
from hf_dis.head.sharded import ShardedHead, sharded_heads
from hf_dis.trainer.row_files import read_rows, write_rows

BODY, HEAD, MOMENTS = "model-body.safetensors", "model-head.safetensors", "dis_head_optimizer.safetensors"


def without_heads(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without the rows of its sharded heads, of which each process has its own."""
    heads = tuple(f"{name}." for name in sharded_heads(model))
    return {name: value for name, value in model.state_dict().items() if not name.startswith(heads)}


def save_head(model: nn.Module, folder: str | Path) -> None:
    """Adds the sharded head to a checkpoint of the rest of the model; every process has to call it.

    Args:
        model: with one sharded head.
        folder: where the first process has saved :func:`without_heads` of the model by ``save_pretrained``.
    """
    folder = Path(folder)
    ((name, head),) = sharded_heads(model).items()
    rows = {f"{name}.{own}": value for own, value in head.named_parameters()}
    wait_for_everyone()
    write_rows(folder / HEAD, rows, head.shard, head.out_features)
    if process_index() == 0:
        _write_index(folder, rows)
    wait_for_everyone()


def load_model(model: PreTrainedModel, folder: str | Path) -> None:
    """Loads a model with one sharded head: each process reads its own rows of the head.

    Args:
        model: whose head has as many classes as the saved one; the number of processes may differ.
        folder: where :func:`save_head` saved.

    Raises:
        DataError: if the head's file is missing, or of a different number of classes.
    """
    ((name, head),) = sharded_heads(model).items()
    rows = read_rows(Path(folder) / HEAD, head.shard, head.out_features)
    with torch.no_grad():
        for own, value in head.named_parameters():
            value.copy_(rows[f"{name}.{own}"])
    config = copy.copy(model.config)
    config.id2label, config.label2id = {0: "0", 1: "1"}, {"0": 0, "1": 1}  # of a small head, which is left out
    saved = type(model).from_pretrained(None, config=config, state_dict=_body(Path(folder)), dtype=model.dtype)
    state = {key: value for key, value in saved.state_dict().items() if not key.startswith(f"{name}.")}
    wrong = model.load_state_dict(state, strict=False)
    missing = [key for key in wrong.missing_keys if not key.startswith(f"{name}.")]
    if missing or wrong.unexpected_keys:
        raise RuntimeError(
            f"{folder} lacks {missing[:5]} and has {wrong.unexpected_keys[:5]} of a different model: load it into a "
            "model of the class that was saved"
        )


def save_moments(head: ShardedHead, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Writes the optimizer's state of the rows of a sharded head; every process has to call it."""
    rows = {
        f"{own}.{name}": value
        for own, parameter in head.named_parameters()
        for name, value in optimizer.state.get(parameter, {}).items()
        if _is_by_row(value, parameter)
    }
    if rows:
        write_rows(Path(folder) / MOMENTS, rows, head.shard, head.out_features)


def load_moments(head: ShardedHead, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Gives an optimizer the state of this process's rows, in place of that of the first process's rows.

    Args:
        head: the sharded head.
        optimizer: that has loaded the state which the first process saved.
        folder: where :func:`save_moments` saved.

    Raises:
        DataError: if the file is missing, or of a different number of classes.
    """
    states = {own: optimizer.state.get(parameter, {}) for own, parameter in head.named_parameters()}
    if not any(isinstance(value, Tensor) and value.dim() for state in states.values() for value in state.values()):
        return  # an optimizer that keeps nothing by row
    for key, value in read_rows(Path(folder) / MOMENTS, head.shard, head.out_features).items():
        own, name = key.split(".")
        states[own][name] = value.to(states[own][name])


def _is_by_row(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(parameter)


def _body(folder: Path) -> dict[str, Tensor]:
    """The weights of the checkpoint's files but the head's."""
    files = set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values())
    return {name: value for file in sorted(files - {HEAD}) for name, value in load_file(folder / file).items()}


def _write_index(folder: Path, rows: dict[str, Tensor]) -> None:
    """Lists all files of weights; the body's only file gets another name, since transformers would read it alone."""
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        os.replace(folder / SAFE_WEIGHTS_NAME, folder / BODY)
        with safe_open(folder / BODY, "pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), BODY)}
    else:
        index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(rows, HEAD)
    files = set(index["weight_map"].values())
    index["metadata"]["total_size"] = sum((folder / file).stat().st_size for file in files)
    written = folder / f"{path.name}.part"
    written.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    os.replace(written, path)
