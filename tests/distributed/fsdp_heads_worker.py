"""Runs of test_fsdp_heads, forked by launch.py: students that FSDP2 shards, with a sharded head beside it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from equality_worker import SamplesByLabel
from sharded_head_worker import TASKS, bytes_sent, examples, student, teacher, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_dis import DISArguments, Distiller, build_distiller
from hf_dis.distributed import average_rows
from hf_dis.head.fsdp_rows import FsdpRows

STEPS, EXAMPLES = 3, 8  # of a process in a step
SIZES = 2**15, 2**17  # numbers of classes; up to 24,576 the teacher's mass of every class is sent
SAMPLED = {"head_mode": "sampled", "num_sampled_classes": 6, "num_shared_classes": 8, "num_tails": 1}
MODES = {
    "sampled": SAMPLED | {"proposal": "uniform"},
    "row-sparse": SAMPLED | {"proposal": "uniform", "row_sparse_head": True, "num_updated_classes": 1000},
    "per item": SAMPLED | {"proposal": "teacher", "num_shared_classes": 0},
    "exact": {"head_mode": "exact"},
}


def fsdp(model: nn.Module, ignored: set[nn.Parameter] | None = None) -> nn.Module:
    """Shards each layer of a model, and the rest with the root."""
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        fully_shard(layer)
    return fully_shard(model, ignored_params=ignored)


def batch(task: str, step: int, rank: int) -> dict[str, Tensor]:
    """The second process has no item in the first step of the tokens."""
    data = examples(task)
    first = (step * dist.get_world_size() + rank) * EXAMPLES
    chosen = data[first : first + EXAMPLES]
    return {name: torch.stack([torch.as_tensor(one[name]) for one in chosen]) for name in chosen[0]}


def made(model: nn.Module, task: str, mode: str, **keywords) -> Distiller:
    distiller = build_distiller(model, teacher(task), DISArguments(hard_label_weight=0.3, **MODES[mode]), **keywords)
    distiller.sampler.__class__ = SamplesByLabel
    return distiller


def train(task: str, mode: str, is_sharded: bool) -> dict[str, Tensor]:
    """Some steps on the items of all processes; a whole student takes the items of each process in turn."""
    model = student(task, is_sharded)
    if is_sharded:
        fsdp(model, set(model.classifier.parameters()))
    distiller = made(model.train(), task, mode)
    head = {*model.classifier.parameters()}
    groups = [{"params": [one for one in model.parameters() if (one in head) is own]} for own in (True, False)]
    optimizer = torch.optim.SGD(groups, lr=0.1, foreach=True)
    number, rank = dist.get_world_size(), dist.get_rank()
    losses = []
    for step_number in range(STEPS):
        batches = [batch(task, step_number, other) for other in range(number)]
        items = sum(map(distiller.count, batches))
        for one in [batches[rank]] if is_sharded else batches:
            with distiller.step(one, holds_logits=False) as step:
                outputs = model(**step.inputs)
                assert mode != "exact" or outputs.logits.shape[1] == 1  # never the logits of all classes
                loss = step.loss(outputs)[0].sum() / items
                (loss * number if is_sharded else loss).backward()
            losses.append(loss.detach())
        if mode == "row-sparse":
            average_rows(model.classifier.parameters(), over_processes=False)
        found = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    losses = torch.stack(losses).sum()
    if is_sharded:
        dist.all_reduce(losses)
    body = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in model.state_dict().items()}
    return {"loss": losses} | found | {f"student.{name}": one for name, one in whole(model, body).items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, those of a sharded head joined."""
    found = {name: one.grad for name, one in model.named_parameters()}
    return whole(
        model, {name: one.full_tensor() if isinstance(one, DTensor) else one.to_dense() for name, one in found.items()}
    )


def step_bytes(num_classes: int, is_sharded: bool) -> int:
    """The bytes of a step, for a number of classes; without sharding FSDP gathers the head, as it would by itself."""
    model = student("image", is_sharded, num_classes)
    arguments = DISArguments(**SAMPLED)
    distiller = build_distiller(model, teacher("image", num_classes), arguments, is_sharded=not is_sharded)
    fsdp(model, set(model.classifier.parameters()) if is_sharded else None)
    model.train()
    for _ in range(2):  # comparisons of the first step are done
        gathers = nullcontext() if is_sharded else mock.patch.object(FsdpRows, "of", lambda *_: None)
        with gathers, bytes_sent() as sent, distiller.step(batch("image", 0, dist.get_rank())) as step:
            step.loss(model(**step.inputs))[0].sum().backward()
    return sum(sent.values())


def run(folder: Path) -> None:
    dist.init_process_group("gloo")
    results = {"world_size": dist.get_world_size()}
    for task in TASKS:
        for mode in MODES:
            results[task, mode] = [train(task, mode, is_sharded) for is_sharded in (True, False)]
    results["bytes"] = {one: [step_bytes(number, one) for number in SIZES] for one in (True, False)}
    torch.save(results, folder / f"rank_{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
