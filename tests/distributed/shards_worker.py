"""Runs of test_shards, forked by launch.py: products and losses of a head whose rows are spread over processes.

Every process computes the same with a whole head too, and saves both.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.distributed.sums import sum_over_processes
from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.head.sharded import ShardedHead, shard_bounds
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.sampling.designs import Updates

C, D = 23, 5
ITEMS = {"many": 6, "few": 1, "none": 0}  # of a batch; there are three tails
COLUMNS, TAILS, TAIL = 4, 3, 6


def sample(num_items: int, seed: int, tail: int = TAIL) -> tuple[Tensor, Tensor]:
    """Classes of the items, with a class twice in some, and of the tails."""
    generator = torch.Generator().manual_seed(seed)
    item_ids = torch.randint(C, (num_items, COLUMNS), generator=generator)
    tails = [torch.randperm(C, generator=generator)[:tail].sort().values for _ in range(TAILS)]
    return item_ids, torch.stack(tails)


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backward(logits: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The logits and, for a loss of them, the dense gradients of the leaves."""
    (logits.double().square().sum() / 3).backward()
    found = [leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad for leaf in leaves]
    return [logits.detach(), *found]


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return values(C, D, seed=1, dtype=dtype).requires_grad_(), values(C, seed=2, dtype=dtype).requires_grad_()


def one_sample(rank: int, processes: int) -> dict:
    """Tensor parallelism: all processes have the same items, and shards of unequal sizes."""
    start, stop = ([0, 2, C] if processes == 2 else [0, 7, 14, 21, C])[rank : rank + 2]
    results = {}
    for (name, num_items), with_bias, row_sparse, tail in product(
        ITEMS.items(), (True, False), (True, False), (TAIL, 0)
    ):
        ids = sample(num_items, seed=3, tail=tail)
        weight, bias = head()
        features = values(num_items, D, seed=4).requires_grad_()
        given = (weight, bias) if with_bias else (weight,)
        whole = backward(
            sampled_logits(features, weight, bias if with_bias else None, *ids, row_sparse), features, *given
        )
        own = [one.detach()[start:stop].requires_grad_() for one in given]
        features = features.detach().requires_grad_()
        logits = sampled_logits(
            features, own[0], own[1] if with_bias else None, *ids, row_sparse, shard=VocabShard(start, stop)
        )
        found = backward(logits, features, *own)
        expected = [*whole[:2], *(gradient[start:stop] for gradient in whole[2:])]
        results["same items", name, with_bias, row_sparse, tail] = found, expected
    return results


def own_samples(rank: int, processes: int) -> dict:
    """Data parallelism: each process has items and samples of its own, and some processes have none."""
    results = {}
    for row_sparse, is_bfloat16, where in product((True, False), (True, False), ("everywhere", "on the first")):
        dtype = torch.float32 if is_bfloat16 else torch.float64
        numbers = [5 - other if where == "everywhere" else 4 * (not other) for other in range(processes)]
        weight, bias = head(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            for other, number in enumerate(numbers):
                features = values(number, D, seed=10 + other, dtype=dtype).requires_grad_()
                logits = sampled_logits(features, weight, bias, *sample(number, seed=20 + other))
                (logits.double().square().sum() / 3 / processes).backward()
                if other == rank:
                    whole = logits.detach(), features.grad * processes
            sharded = ShardedHead(D, C, dtype=dtype)
            sharded.copy_rows(weight.detach(), bias.detach())
            features = values(numbers[rank], D, seed=10 + rank, dtype=dtype).requires_grad_()
            logits = sharded.sampled(features, *sample(numbers[rank], seed=20 + rank), row_sparse)
        found = backward(logits, features, sharded.weight, sharded.bias)
        start, stop = sharded.shard.start, sharded.shard.stop
        expected = *whole, weight.grad[start:stop], bias.grad[start:stop]
        results["own items", row_sparse, is_bfloat16, where] = found, list(expected)
    return results


def all_classes(rank: int, processes: int) -> dict:
    """The logits of all classes, for unequal numbers of items in two dimensions."""
    results = {}
    for shape in ([2, 3 - min(rank, 2), D], [rank, D]):
        weight, bias = head()
        sharded = ShardedHead(D, C, dtype=torch.float64)
        sharded.copy_rows(weight.detach(), bias.detach())
        for other in range(processes):
            theirs = [2, 3 - min(other, 2), D] if len(shape) == 3 else [other, D]
            features = values(*theirs, seed=other).requires_grad_()
            logits = torch.nn.functional.linear(features, weight, bias)
            (logits.square().sum() / 3 / processes).backward()
            if other == rank:
                whole = logits.detach(), features.grad * processes
        features = values(*shape, seed=rank).requires_grad_()
        found = backward(sharded(features), features, sharded.weight, sharded.bias)
        start, stop = sharded.shard.start, sharded.shard.stop
        results["all classes", len(shape)] = found, [*whole, weight.grad[start:stop], bias.grad[start:stop]]
    return results


def losses(rank: int, processes: int) -> dict:
    """DISLoss in tensor parallelism of two by two: the loss of the same items, and what the proposal learns."""
    results, groups = {}, [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    if processes != 4:
        return results
    data_rank, start, stop = rank // 2, *shard_bounds(C, 2)[rank % 2 : rank % 2 + 2]
    for divergence, num_sampled in product(("forward_kl", "reverse_kl"), (6, C)):
        spec = SamplerSpec(num_sampled_classes=num_sampled, num_shared_classes=0 if num_sampled == C else 5)
        weight, bias = head()
        features, labels = values(7, D, seed=30 + data_rank).requires_grad_(), torch.arange(7)
        teacher = 3 * values(7, C, seed=40 + data_rank)

        def reduce(statistics):
            return sum_over_processes(statistics, pairs[rank % 2])

        def dis_loss(shard=None, spec=spec, divergence=divergence, reduce=reduce):
            sampler = make_sampler(C, spec, seed=data_rank)
            return DISLoss(sampler, reduce=reduce, divergence=divergence, shard=shard)

        whole_loss, sharded_loss = dis_loss(), dis_loss(VocabShard(start, stop, groups[data_rank]))
        whole = backward(whole_loss(features, weight, bias, teacher, labels), features, weight, bias)
        own = [one.detach()[start:stop].requires_grad_() for one in (weight, bias)]
        features = features.detach().requires_grad_()
        found = backward(sharded_loss(features, *own, teacher, labels), features, *own)
        states = [list(loss.sampler.state_dict().values()) for loss in (sharded_loss, whole_loss)]
        expected = [*whole[:2], *(gradient[start:stop] for gradient in whole[2:])]
        results["DISLoss", divergence, num_sampled] = [*found, *states[0]], [*expected, *states[1]]
    return results


def updates(rank: int, processes: int) -> dict:
    """The mean, over many samples of the rows that are updated, of the gradient of all rows."""
    weight, bias = head()
    ids, features = sample(6, seed=3), values(6, D, seed=4)
    sharded = ShardedHead(D, C, dtype=torch.float64)
    sharded.copy_rows(weight.detach(), bias.detach())
    gradients, counts = [], []
    for number, update in [(1, None), *((400, Updates(3, start / 400)) for start in range(400))]:
        sharded.zero_grad()
        sharded.sampled(features, *ids, True, update).square().sum().backward()
        gradients.append(sharded.weight.grad.to_dense() / number)
        counts.append(len(sharded.weight.grad.coalesce().values()))
    return {"updates": ([sum(gradients[1:])], [gradients[0]]), "updated": counts}


def run(output_dir: Path) -> None:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    results = {"world_size": processes}
    parts = [one_sample, own_samples, all_classes, updates, *([losses] if processes == 4 else [])]
    for part in parts:
        results |= part(rank, processes)
    torch.save(results, output_dir / f"rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
