"""Runs of test_sharded, forked by launch.py: a training step of a student that ``fully_shard`` (FSDP2) sharded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tiny_models import gpt2, images, llama, patched_modules, tokens, vit
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_dis import SamplerSpec, make_sampler
from hf_dis.head.switch import SampledHead
from hf_dis.items import Items
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.models.head_search import find_head_layers
from hf_dis.teacher.online import OnlineTeacher

CLASSES, ITEMS = 40, 8  # of each process; an item of the language models is the last token of an example
MODELS = {"ViT": vit, "Llama": llama, "GPT-2, tied": gpt2}
UNITS = ("in the root", "its own unit")


def batch(name: str, rank: int) -> tuple[dict[str, torch.Tensor], Items]:
    if name == "ViT":
        return {"pixel_values": images(ITEMS, seed=rank)}, Items(ITEMS)
    length = 6
    positions = torch.arange(ITEMS) * length + length - 2
    return tokens(ITEMS, CLASSES, length, seed=rank), Items(ITEMS, None, positions, length)


def step(student: nn.Module, names: tuple[str, ...], teacher: OnlineTeacher, name: str, rank: int) -> torch.Tensor:
    """Backward of the mean loss over the items of a process: its samples depend on its rank alone."""
    inputs, items = batch(name, rank)
    sampler = make_sampler(CLASSES, SamplerSpec(num_sampled_classes=6, num_shared_classes=8, rank_depth=10), seed=rank)
    sample = sampler.sample(teacher(inputs, items))
    with SampledHead(student, names).only(sample.item_ids, sample.tail_ids, items.positions):
        loss = sampled_forward_kl(student(**inputs).logits, sample, 2.0).loss
        loss.mean().backward()
    return loss.detach().mean()


def gradients(student: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in student.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def run(output_dir: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {"world_size": processes}
    for name, build in MODELS.items():
        teacher = OnlineTeacher(build(CLASSES, seed=1, spread=30), CLASSES, 2.0, 10)
        names = find_head_layers(build(CLASSES), CLASSES)
        whole = build(CLASSES).train()
        for other in range(processes):
            step(whole, names, teacher, name, other)
        for parameter in whole.parameters():
            parameter.grad /= processes
        results[name, "whole"] = gradients(whole)
        for unit in UNITS:
            student = build(CLASSES).train()
            layers = [module for module in student.modules() if isinstance(module, nn.ModuleList)]
            for layer in layers[0]:
                fully_shard(layer)
            if unit == "its own unit" and "tied" not in name:
                fully_shard(student.get_submodule(names[0]))
            fully_shard(student)
            step(student, names, teacher, name, rank)
            results[name, unit] = gradients(student)
            results[name, unit, "patched"] = patched_modules(student)
            results[name, unit, "sharded"] = all(hasattr(p, "full_tensor") for p in student.parameters())
    torch.save(results, output_dir / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
