"""Runs of test_sharded_exact, forked by launch.py: losses on all classes of a sharded head against a whole one."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import tensor_parallel_worker
import torch
import torch.distributed as dist
from sharded_head_worker import bytes_sent
from torch import Tensor, nn

from hf_dis import ShardedHead
from hf_dis.distributed import exact_head
from hf_dis.distributed.exact_head import ShardedHeadLoss
from hf_dis.loss.exact_head import HeadInput, HeadLoss
from hf_dis.loss.f_divergence import make_divergence
from hf_dis.loss.objective import Objective
from hf_dis.models.after_head import AfterHead
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import CompactTargets, compact_targets

C, D, TEMPERATURE = 41, 6, 2.0
NUMBERS = {"unequal": (7, 4, 0, 2), "some without": (0, 5, 0, 0), "none": (0, 0, 0, 0)}
TEACHERS = {
    "logits": ("forward_kl", "reverse_kl", "jsd", "skew_kl"),
    "stored": ("forward_kl",),
    "none": ("forward_kl",),
}
FACTORS = ("equal", "by item")


def cases() -> list[tuple[str, str, str, str]]:
    return [
        (numbers, teacher, divergence, factors)
        for numbers, teacher, factors in product(NUMBERS, TEACHERS, FACTORS)
        for divergence in TEACHERS[teacher]
    ]


def stored(logits: Tensor) -> CachedTargets:
    """Stored targets of items; each item's depend on the item alone."""
    rows = [compact_targets(row, TEMPERATURE, 6, 5, torch.Generator()) for row in logits.split(1)]
    return CachedTargets(CompactTargets(*map(torch.cat, zip(*rows, strict=True))), C)


def compute(case: tuple[str, ...], is_sharded: bool, has_bias: bool = True) -> dict[str, Tensor]:
    """Loss, terms and gradients of the items of this process, or of all items by a whole head."""
    numbers, teacher, divergence, factors = case
    counts = NUMBERS[numbers][: dist.get_world_size()]
    rank = dist.get_rank()
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1])) if is_sharded else slice(0, sum(counts))
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)[mine].requires_grad_()
    logits = 3 * torch.randn(sum(counts), C, generator=generator, dtype=torch.float64)[mine]
    labels = torch.randint(C, (sum(counts),), generator=generator)[mine]
    weights = torch.rand(sum(counts), generator=generator, dtype=torch.float64)[mine]
    head = ShardedHead(D, C, has_bias, dtype=torch.float64, seed=1)
    layer = head if is_sharded else whole(head)
    given = HeadInput(features, layer.weight, layer.bias, features.dtype, AfterHead(scale=1.5, soft_cap=4.0))
    objective = Objective(C, labels, TEMPERATURE, 1.0 if teacher == "none" else 0.3, make_divergence(divergence))
    chunks = {
        "logits": lambda: iter([logits[:0], *logits.split(3)]),
        "stored": lambda: iter([stored(logits)]),
        "none": lambda: None,
    }[teacher]
    sharded = (layer,) if is_sharded else ()
    exact = (ShardedHeadLoss if is_sharded else HeadLoss)(given, *sharded, objective, chunks)
    exact.add_all(chunks())
    loss, terms = exact.result()
    (loss * (weights if factors == "by item" else 0.7)).sum().backward()
    gradients = {name: one.grad for name, one in layer.named_parameters()}
    if is_sharded:
        evaluated = evaluate(given, layer, objective, chunks)
        gradients = {name: joined(one) for name, one in gradients.items()}
        return {"loss": loss.detach(), "features": features.grad, "evaluated": evaluated, **terms, **gradients}
    rows = {name: one / dist.get_world_size() for name, one in gradients.items()}
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    of_items = {"loss": loss.detach(), "features": features.grad, **terms}
    return {name: one[own] for name, one in of_items.items()} | rows


@torch.no_grad()
def evaluate(given, layer, objective, chunks) -> dict[str, Tensor]:
    exact = ShardedHeadLoss(given, layer, objective, chunks, with_kl=True)
    exact.add_all(chunks())
    return exact.terms()


def whole(head: ShardedHead) -> nn.Linear:
    layer = nn.Linear(D, C, head.bias is not None, dtype=torch.float64)
    with torch.no_grad():
        for name, one in layer.named_parameters():
            one.copy_(joined(head.get_parameter(name).detach()))
    return layer


def joined(rows: Tensor) -> Tensor:
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return torch.cat(parts)


def ranked() -> dict[str, Tensor]:
    head = ShardedHead(D, C, dtype=torch.float64, seed=1)
    number = NUMBERS["unequal"][dist.get_rank()]
    features = torch.randn(number, D, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    with mock.patch("hf_dis.head.sharded.TILE_ELEMENTS", 2 * C):
        found = [head.top_k(features, k) for k in (1, 5, 30, C)]
    return {"found": found, "logits": whole(head)(features).detach()}


def bytes_of(num_classes: int, teacher: str) -> int:
    """The bytes that a loss on all classes and its backward send."""
    head = ShardedHead(D, num_classes)
    features, labels = torch.randn(5, D).requires_grad_(), torch.arange(5)
    given = HeadInput(features, head.weight, head.bias, features.dtype)
    objective = Objective(num_classes, labels, 1.0, 1.0 if teacher == "none" else 0.5)
    answers = None if teacher == "none" else [torch.randn(5, num_classes)]
    with bytes_sent() as sent:
        exact = ShardedHeadLoss(given, head, objective, lambda: answers)
        exact.add_all(answers)
        exact.result()[0].sum().backward()
    return sum(sent.values())


def refused() -> str:
    """The message where every teacher has an item too few."""
    head = ShardedHead(D, C)
    given = HeadInput(torch.randn(5, D), head.weight, head.bias, torch.float32)
    try:
        ShardedHeadLoss(given, head, Objective(C, None, 1.0), lambda: None).add_all([torch.randn(4, C)])
    except ValueError as error:
        return str(error)


def run(folder: Path) -> None:
    dist.init_process_group("gloo")
    results = {"world_size": dist.get_world_size(), "ranked": ranked(), "refused": refused()}
    # Several blocks, and several passes of each.
    tiles = {"BLOCK_BYTES": 6 * C * 8, "CPU_PASS_ELEMENTS": 3 * C}
    with mock.patch.multiple(exact_head, **tiles):
        for case in cases():
            results[case] = compute(case, True), compute(case, False)
        results["no bias"] = [compute(cases()[0], is_sharded, False) for is_sharded in (True, False)]
    results["bytes"] = {kind: [bytes_of(number, kind) for number in (64, 4096)] for kind in ("none", "logits")}
    if dist.get_world_size() == 2:
        results |= tensor_parallel_worker.steps(folder)
    torch.save(results, folder / f"rank_{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
