"""What test_sharded starts by torchrun: a training step of a student that torch's ``fully_shard`` (FSDP2) sharded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from models import gpt2, images, llama, patched_modules, tokens, vit
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_dis import make_sampler
from hf_dis.head_search import find_head_layers
from hf_dis.heads import SampledHead
from hf_dis.losses import sampled_distillation_loss
from hf_dis.rows import Rows
from hf_dis.teachers import OnlineTeacher

CLASSES, ROWS = 40, 8  # of each process; a row of the language models is the last token of an example
MODELS = {"ViT": vit, "Llama": llama, "GPT-2, tied": gpt2}
UNITS = ("in the root", "its own unit")


def batch(name: str, rank: int) -> tuple[dict[str, torch.Tensor], Rows]:
    if name == "ViT":
        return {"pixel_values": images(ROWS, seed=rank)}, Rows(ROWS)
    length = 6
    positions = torch.arange(ROWS) * length + length - 2
    return tokens(ROWS, CLASSES, length, seed=rank), Rows(ROWS, None, positions, length)


def step(student: nn.Module, names: tuple[str, ...], teacher: OnlineTeacher, name: str, rank: int) -> torch.Tensor:
    """Backward of the mean loss over the rows of a process: its draws depend on its rank alone."""
    inputs, rows = batch(name, rank)
    sampler = make_sampler(CLASSES, num_sampled_classes=6, num_shared_classes=8, rank_depth=10, seed=rank)
    draw = sampler.draw(teacher(inputs, rows))
    with SampledHead(student, names).only(draw.row_ids, draw.shared_ids, rows.positions):
        loss, _ = sampled_distillation_loss(student(**inputs).logits, draw, 2.0)
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
            (step(whole, names, teacher, name, other))
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
