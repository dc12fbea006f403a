"""Tied weights: the modules that hold the same parameter, and the embeddings that share an output head's weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import prod

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_dis.models.spread import TENSOR_PARALLEL, reshard


def modules_with(model: nn.Module, parameter: nn.Parameter) -> dict[str, nn.Module]:
    """Finds the modules that hold a parameter as their own, by name; more than one where the parameter is tied."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(own is parameter for own in module.parameters(recurse=False))
    }


def find_tied_embeddings(model: nn.Module, head_layers: Iterable[str]) -> tuple[str, ...]:
    """Finds the embeddings that share the trainable weight of an output head.

    Args:
        model: the student.
        head_layers: the linear layers of its output head among ``model.named_modules()``.

    Returns:
        the names of the embeddings among ``model.named_modules()``.
    """
    weights = [model.get_submodule(name).weight for name in head_layers]
    found = {
        name: None
        for weight in weights
        if weight.requires_grad
        for name, module in modules_with(model, weight).items()
        if isinstance(module, nn.Embedding)
    }
    return tuple(found)


def check_tied_rows(model: nn.Module) -> None:
    """Checks that an optimizer steps all copies of a tied weight that FSDP2 shards in different units.

    Each unit pads the rows of a process to a number that all processes share. A padded copy belongs to one unit, and
    the optimizer steps one of the copies.

    Args:
        model: sharded by FSDP2 or not.

    Raises:
        ValueError: if FSDP2 has to pad the rows of such a weight.
    """
    reshard(model)  # a weight that is whole after a forward is one of each unit
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    if not units:
        return
    holders: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[parameter].append(name)
    for parameter, names in holders.items():
        apart = {max((unit for unit in units if name.startswith(unit and f"{unit}.")), default="") for name in names}
        if len(apart) < 2 or not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        sizes = {
            name: mesh.size(place)
            for place, name in enumerate(mesh.mesh_dim_names or ["fsdp"])
            if not parameter.placements[place].is_replicate()
        }
        shared = prod(size for name, size in sizes.items() if name != TENSOR_PARALLEL)
        if shared > 1 and len(parameter) % prod(sizes.values()):
            raise ValueError(
                f"{' and '.join(names)} are tied, and FSDP2 shards them apart: their {len(parameter)} rows have to "
                f"be a multiple of {prod(sizes.values())}, or one of them keeps its old values. Enlarge the "
                "vocabulary by resize_token_embeddings, load the model without fsdp_size, or untie the weights"
            )
