"""Finds a model's output head: by the model's own statement, by the width of its layers, or by name.

PEFT puts its own modules around a layer. The head is then the outermost module, which the model calls. The *linear
layers* inside add up to the head, and are switched to the sampled classes together. docs/heads.md lists every kind.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import is_peft_available

from hf_dis.models.spread import is_fully_sharded, is_sharded_by_fsdp, is_spread_by_rows

if is_peft_available():
    from peft import PeftModel
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper
else:
    PeftModel = LoraLinear = ModulesToSaveWrapper = ()  # no object is an instance of an empty tuple


def find_heads(model: nn.Module, num_classes: int, head_name: str | None = None) -> tuple[str, ...]:
    """Finds the modules whose output a model's logits are, before bias, scale or soft-cap.

    A language model names its head itself (``get_output_embeddings``). The head of a classifier is the only layer with
    C outputs. DeiT, LeViT and SwiftFormer have two such layers, one of them for distillation: the logits are the mean.

    Args:
        model: teacher or student, in a PEFT model or not.
        num_classes: C, the width of the head.
        head_name: the head among the model's modules, where the rule does not find it; two names with a comma between
            them where the logits are the mean of two heads.

    Returns:
        the names of the modules among ``model.named_modules()``.

    Raises:
        ValueError: if there is no head, or more than one candidate; lists the candidates.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    modules = dict(base.named_modules())
    candidates = _layers_of_width(modules, num_classes)
    if head_name is not None:
        names = tuple(name.strip() for name in head_name.split(","))
        for name in names:
            _check_named(base, modules, name, num_classes, candidates)
    else:
        embeddings = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
        named = [name for name, module in modules.items() if module is embeddings]
        names = tuple(named or candidates)
        if len(names) != 1 and not _are_a_pair(names):
            raise ValueError(
                f"the output head of {type(base).__name__} with {num_classes} classes was not found: "
                f"candidates are {candidates or 'none'}; name it with head_name, or use head_mode='exact'"
            )
    return tuple(prefix + name for name in names)


def find_head(model: nn.Module, num_classes: int, head_name: str | None = None) -> str:
    """Finds the output head of a model with one head; the arguments are those of :func:`find_heads`.

    Returns:
        the name of the module among ``model.named_modules()``.

    Raises:
        ValueError: if there is no head, or more than one; lists the candidates.
    """
    names = find_heads(model, num_classes, head_name)
    if len(names) > 1:
        raise ValueError(
            f"{type(model).__name__} has two output heads, {' and '.join(names)}, and one is expected: use a model "
            "with one head"
        )
    return names[0]


def find_head_layers(model: nn.Module, num_classes: int, head_name: str | None = None) -> tuple[str, ...]:
    """Finds the linear layers of a student's output head, which :class:`hf_dis.head.switch.SampledHead` switches.

    The layers are the head itself, or both heads where the logits are the mean of two. Where an adapter was added to
    the head, they are the layer below the adapter and the second layer of the adapter.

    Args:
        model: the student, in a PEFT model or not.
        num_classes: C, the width of the head.
        head_name: as for :func:`find_heads`.

    Returns:
        the names of ``nn.Linear`` modules among ``model.named_modules()``.

    Raises:
        ValueError: if there is no head or more than one candidate, or if the head cannot be switched.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"the student learns by {model.active_peft_config.peft_type.value}: prompt learning puts virtual tokens "
            "among the tokens of the text, which the teacher does not get; use LoRA, or train the whole student"
        )
    heads = find_heads(model, num_classes, head_name)
    layers = tuple(layer for name in heads for layer in _linear_layers(name, model.get_submodule(name)))
    for layer in layers:
        _check_spread(layer, model.get_submodule(layer), is_fully_sharded(model))
    return layers


def _layers_of_width(modules: dict[str, nn.Module], num_classes: int) -> list[str]:
    """Lists the layers with C outputs, the outermost where one is inside another."""
    found: list[str] = []
    for name, module in modules.items():
        inside = found and name.startswith(f"{found[-1]}.")
        if getattr(module, "out_features", None) == num_classes and not inside:
            found.append(name)
    return found


def _are_a_pair(names: tuple[str, ...]) -> bool:
    """Returns True if the names are those of a head and of a head for distillation beside it."""
    return len(names) == 2 and names[0].count(".") == names[1].count(".") and sum("dist" in n for n in names) == 1


def _check_named(
    model: nn.Module, modules: dict[str, nn.Module], name: str, num_classes: int, candidates: list[str]
) -> None:
    if name not in modules:
        raise ValueError(
            f"head_name is {name!r}, but {type(model).__name__} has no such module; "
            f"layers with {num_classes} outputs: {candidates or 'none'}"
        )
    if getattr(modules[name], "out_features", None) != num_classes:
        raise ValueError(
            f"head_name is {name!r}, a {type(modules[name]).__name__}: the head has to be an nn.Linear "
            f"with {num_classes} outputs; candidates: {candidates or 'none'}"
        )


def _linear_layers(name: str, module: nn.Module) -> list[str]:
    """Lists the ``nn.Linear`` layers that add up to a head."""
    exact = "or use head_mode='exact'"
    if isinstance(module, ModulesToSaveWrapper):
        (adapter,) = module.active_adapters
        return _linear_layers(f"{name}.modules_to_save.{adapter}", module.modules_to_save[adapter])
    if isinstance(module, LoraLinear):
        if module.merged:
            raise ValueError(
                f"the adapters of the output head {name!r} are merged, so they would not be trained: call "
                "unmerge_adapter() before training"
            )
        adapters = [adapter for adapter in module.active_adapters if adapter in module.lora_B]
        kinds = {type(module.lora_variant[adapter]).__name__ for adapter in adapters if adapter in module.lora_variant}
        if kinds:
            raise ValueError(
                f"the adapter of the output head {name!r} is not a plain LoRA ({', '.join(kinds)}) and needs every "
                f"class: set use_dora=False, leave the head out of target_modules, {exact}"
            )
        below = _linear_layers(f"{name}.base_layer", module.base_layer)
        return [*below, *(f"{name}.lora_B.{adapter}" for adapter in adapters)]
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"the output head {name!r} is a {_full_name(module)}, which cannot compute single classes: it has to be "
            "an nn.Linear, not quantised, with or without a LoRA adapter, and trained whole if at all; leave it out "
            f"of quantisation, of other adapters and of trainable_token_indices, {exact}"
        )
    weight = module.weight
    if type(weight) not in (nn.Parameter, torch.Tensor, DTensor) or not weight.is_floating_point():
        raise ValueError(
            f"the weight of the output head {name!r} is a {type(weight).__name__} of {weight.dtype}: single rows of a "
            "quantised weight cannot be read. Load the student with the head left as it is (llm_int8_skip_modules, "
            f"modules_to_not_convert), {exact}"
        )
    return [name]


def _check_spread(name: str, layer: nn.Linear, is_fsdp: bool) -> None:
    """Checks that a layer that is spread over processes is spread by its rows, weight and bias alike."""
    values = dict(layer.named_parameters(recurse=False))
    if not any(isinstance(value, DTensor) for value in values.values()):
        return
    for kind, value in values.items():
        if not is_spread_by_rows(value) and not (is_fsdp and is_sharded_by_fsdp(value)):
            raise ValueError(
                f"the {kind} of the output head {name!r} is a {type(value).__name__}, and not spread by its rows "
                "for tensor parallelism, or by FSDP2 over one group of processes. Load the student with "
                "DistributedConfig(tp_size=...) or DistributedConfig(fsdp_size=...), or whole; with HSDP call "
                "build_distiller before fully_shard"
            )


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
