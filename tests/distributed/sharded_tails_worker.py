"""Runs of test_sharded_tails, forked by launch.py: tails and class memories of parts of the classes, and of all."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from hf_dis import SamplerSpec, make_sampler
from hf_dis.distributed.sums import sum_over_processes
from hf_dis.head.sharded import shard_bounds
from hf_dis.head.vocab_shard import VocabShard
from hf_dis.sampling import class_memory
from hf_dis.sampling.class_memory import ClassMemory, sampled_mass
from hf_dis.sampling.sharded_tails import ShardedTails
from hf_dis.sampling.tails import ClassDensity, sample_tails
from hf_dis.teacher.targets import TeacherTargets

CLASSES, SIZES = (23, 30_011), {"few": (5, 3), "many": (20, 2), "all": (30_011, 2)}
KINDS = ("flat", "steep", "one side")
# Steps that a density serves.
STEPS = 1, 2, 3
# Of samplers that keep all classes: one whose mass is sent dense, and two whose mass is sampled.
SENT = 100, 1_000, 2_000


def density(num_classes: int, kind: str, seed: int) -> torch.Tensor:
    """With a floor; steep: some classes are certain; one side: nearly all mass is in the last tenth."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(num_classes, dtype=torch.float64, generator=generator)
    if kind == "steep":
        values = values**30
    if kind == "one side":
        values[: num_classes * 9 // 10] *= 1e-9
    return 0.95 * values / values.sum() + 0.05 / num_classes


def tails(shard: VocabShard) -> dict:
    """Found and expected tails of this process."""
    results = {}
    for num_classes, kind, (size, (num_sampled, num_tails)), seed in (
        (a, b, c, d) for a in CLASSES for b in KINDS for c in SIZES.items() for d in range(20)
    ):
        bounds = shard_bounds(num_classes, shard.number)
        own = VocabShard(*bounds[shard.index : shard.index + 2])
        whole = density(num_classes, kind, seed)
        seeds = [torch.Generator().manual_seed(100 * seed + shard.index) for _ in range(2)]
        part, sizes = ClassDensity(whole[own.start : own.stop]), (num_sampled, num_tails)
        sharded = ShardedTails(own, num_classes)
        for _ in range(2):  # the second tails are those of a density that has served a step
            found = sharded.sample(part, *sizes, seeds[0])
            expected = sample_tails(ClassDensity(whole), *sizes, seeds[1])
        same_state = torch.equal(seeds[0].get_state(), seeds[1].get_state())
        results[num_classes, kind, size, seed] = tuple(found), tuple(expected), same_state
    return results


def memories(shard: VocabShard) -> dict:
    """The running means of a shard and those of a whole memory, and their densities, after some steps."""
    results = {}
    for num_classes, steps in product(CLASSES, STEPS):
        bounds = shard_bounds(num_classes, shard.number)
        own = VocabShard(*bounds[shard.index : shard.index + 2])
        with mock.patch.object(class_memory, "CLASSES_PER_STEP", -(-num_classes // steps)):
            parts, whole = ClassMemory(num_classes, 0.9, shard=own), ClassMemory(num_classes, 0.9)
        generator = torch.Generator().manual_seed(shard.index)
        for _ in range(4):
            parts.density(0.05), whole.density(0.05)
            ids = torch.randint(num_classes, (1, 12), generator=generator)
            met = torch.rand(12, 2, generator=generator) * torch.tensor([1.0, 3.0])
            mass = torch.rand(num_classes, generator=generator)
            statistics = sum_over_processes(
                {
                    "tail": torch.sparse_coo_tensor(ids, met, (num_classes, 2), check_invariants=False),
                    "class_mass": sampled_mass(mass, generator),
                    "items": torch.tensor(6),
                    "not_finite": torch.tensor(0),
                }
            )
            parts.update(statistics)
            whole.update(statistics)
        place = slice(own.start, own.stop)
        found = {**parts.state_dict(), "density": parts.density(0.05).values}
        expected = {**whole.state_dict(), "density": whole.density(0.05).values}
        results[num_classes, steps] = found, {name: v[place] if v.dim() else v for name, v in expected.items()}
    return results


def sent(num_classes: int) -> tuple[int, torch.Tensor]:
    """Bytes that a process sends to let a sampler of all classes learn, and the marginal that it learns."""
    sent_bytes = []

    def counted(own, place):
        return lambda *given, **named: (sent_bytes.append(given[place].nbytes), own(*given, **named))[1]

    spec = SamplerSpec(num_sampled_classes=4, num_shared_classes=16, rank_depth=4, num_tails=1, proposal_decay=0.0)
    sampler = make_sampler(num_classes, spec, seed=dist.get_rank())
    logits = torch.randn(6, num_classes, generator=torch.Generator().manual_seed(dist.get_rank()))
    sample = sampler.sample([TeacherTargets(logits, 1.0, 4)])
    with (
        mock.patch.object(class_memory, "MASS_POINTS", 8),
        mock.patch.object(dist, "all_reduce", counted(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather_into_tensor", counted(dist.all_gather_into_tensor, 1)),
    ):
        sampler.learn(sample, torch.ones_like(sample.log_weights), sum_over_processes)
    return sum(sent_bytes), sampler.proposal.memory.marginal


def run(folder: Path) -> None:
    dist.init_process_group("gloo")
    shard = VocabShard(0, 1)
    results = {"world_size": shard.number, "tails": tails(shard), "memories": memories(shard)}
    results["sent"] = {num_classes: sent(num_classes) for num_classes in SENT}
    torch.save(results, folder / f"rank_{shard.index}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert "RANK" in os.environ
    run(Path(sys.argv[1]))
