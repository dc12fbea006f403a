"""Time, memory and bytes on the wire of a training step of a sharded head, by classes and processes.

    python benchmarks/sharded_head.py --json sharded_head.jsonl
    python benchmarks/sharded_head.py --json sharded_head.jsonl --classes  # prints what the file has
    python benchmarks/sharded_head.py --estimate

Each process has 32 items of random features, and its rows of a random head. A step is loss, backward and optimizer.
There is no teacher's forward. The processes talk by gloo on this machine. Methods:

exact       all classes, stored targets, in tiles (hf_dis.distributed.exact_head); dense gradient, fused AdamW
partial_fc  PartialFC (arXiv 2010.05222): the labels and a uniform tenth of each shard's classes, softmax over these
dis         the "dis" proposal with stored targets and a shared tail; row-sparse gradient, RowSparseAdamW

ms is the median time of a step of the slowest process. Where a density over classes serves several steps, as many
steps are timed together. peak_mb is the highest resident size of a process, on Linux, less that before the head was
made. bytes are those that a process gives to torch.distributed per step, a mean over such steps. A line is written for
each measurement, and one that is in the file already is not made again. 16 million classes need 20 GB of memory.

--estimate prints the table of docs/distributed.md from formulae: no process is started.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import append, command, header, machine, parse, parser, read, row
from torch import Tensor

from hf_dis import RowSparseAdamW, SamplerSpec, ShardedHead
from hf_dis.distributed.exact_head import ShardClasses, ShardedHeadLoss
from hf_dis.distributed.sums import average_rows, sum_over_processes
from hf_dis.loss.cross_entropy import exact_cross_entropy
from hf_dis.loss.divergence import FORWARD_KL
from hf_dis.loss.exact_head import BLOCK_BYTES, HeadInput
from hf_dis.loss.objective import Objective
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.sampling.class_memory import MASS_POINTS
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import CompactTargets, TargetLayout

METHODS = ("exact", "partial_fc", "dis")
KEY = ("processes", "classes", "method")
ITEMS, FEATURES, SHARE, DEPTH, STORED = 32, 64, 0.1, 32, 32
SPEC = SamplerSpec(num_sampled_classes=32, num_shared_classes=512, num_tails=1, rank_depth=DEPTH)
# Of the estimate: 400 Gb/s, and how a head of 100 million classes is trained on 64 cards.
WIRE, CLASSES, CARDS, CARD_ITEMS, CARD_FEATURES = 400e9 / 8, 100_000_000, 64, 128, 512
# Of the class memory and the density of the shared tail, for each class that a process holds.
CLASS_BYTES = 40


class Steps:
    """Training steps of a sharded head.

    Args:
        method: one of ``METHODS``.
        num_classes: C.
    """

    def __init__(self, method: str, num_classes: int):
        rank = dist.get_rank()
        generator = torch.Generator().manual_seed(rank)
        self.head = ShardedHead(FEATURES, num_classes, bias=False)
        self.features = torch.randn(ITEMS, FEATURES, generator=generator).requires_grad_()
        self.labels = torch.randint(num_classes, (ITEMS,), generator=generator)
        self.targets = given_targets(num_classes, generator)
        self.sampler = None
        if method == "dis":
            layout = TargetLayout(num_classes, DEPTH, STORED)
            self.sampler = make_cached_sampler(layout, SPEC, seed=rank, shard=self.head.shard)
        self.generator, self.loss = (
            generator,
            {"exact": self.exact, "partial_fc": self.partial_fc, "dis": self.dis}[method],
        )
        parameters = self.head.parameters()
        # The fused step is the Trainer's default, and has no temporary copy of the weight.
        self.optimizer = torch.optim.AdamW(parameters, fused=True) if method == "exact" else RowSparseAdamW(parameters)

    @property
    def number_timed(self) -> int:
        """The number of steps after which the work is the same again."""
        return 1 if self.sampler is None else self.sampler.proposal.memory.steps_per_density

    def run(self) -> None:
        """One step."""
        self.loss().sum().backward()
        if self.head.weight.grad.is_sparse:
            average_rows([self.head.weight], over_processes=False)
        self.optimizer.step()
        self.head.weight.grad = self.features.grad = None

    def exact(self) -> Tensor:
        """All classes."""
        given = HeadInput(self.features, self.head.weight, None, self.features.dtype)
        objective = Objective(self.head.out_features, self.labels, 1.0, 0.5)
        exact = ShardedHeadLoss(given, self.head, objective, lambda: [self.targets])
        exact.add_all([self.targets])
        return exact.result()[0]

    def partial_fc(self) -> Tensor:
        """Labels of all processes that the shard holds, and uniform negatives: a tenth of its classes."""
        shard = self.head.shard
        labels, features = shard.gather(self.labels).flatten(), shard.gathered(self.features).flatten(0, 1)
        local = labels - shard.start
        held = local[(local >= 0) & (local < len(shard))]
        priority = torch.rand(len(shard), generator=self.generator).index_fill_(0, held, 2.0)
        rows = priority.topk(max(len(held), int(SHARE * len(shard)))).indices.sort().values
        logits = features @ F.embedding(rows, self.head.weight, sparse=True).mT
        return SampledCrossEntropy.apply(logits, local, rows, ShardClasses(shard))

    def dis(self) -> Tensor:
        """Sampled classes."""
        sample = self.sampler.sample([self.targets], self.labels)
        logits = self.head.sampled(self.features, sample.item_ids, sample.tail_ids, True, sample.updates)
        result = FORWARD_KL.sampled(logits, sample, 1.0)
        self.sampler.learn(sample, result.signal, sum_over_processes)
        return result.loss


class SampledCrossEntropy(torch.autograd.Function):
    """Cross-entropy of all items over the classes that the shards chose; the shards merge a maximum and two sums."""

    @staticmethod
    def forward(ctx, logits, local, rows, classes):
        place = torch.searchsorted(rows, local).clamp_(max=len(rows) - 1)
        is_here = rows[place] == local
        given = {"columns": lambda ids: place[:, None], "only_here": lambda values, ids: values * is_here[:, None]}
        with mock.patch.multiple(classes, **given):
            loss, gradient = exact_cross_entropy(logits, local, classes)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[:, None], None, None, None


def given_targets(num_classes: int, generator: torch.Generator) -> CachedTargets:
    """Stored targets of random classes."""
    ids = torch.randint(num_classes // DEPTH, (ITEMS, DEPTH), generator=generator)
    ids += torch.arange(DEPTH) * (num_classes // DEPTH)  # distinct
    log_probs = (3 * torch.randn(ITEMS, DEPTH, generator=generator)).log_softmax(1).sort(descending=True).values - 0.2
    tail = torch.randint(num_classes, (ITEMS, STORED), generator=generator).sort(1).values
    mass = (1 - log_probs.exp().sum(1)).log()
    return CachedTargets(
        CompactTargets(ids, log_probs, tail, mass, torch.full((ITEMS,), 3.0), torch.zeros(ITEMS)), num_classes
    )


@contextmanager
def bytes_sent() -> Iterator[dict[str, int]]:
    """Counts the bytes that this process gives to torch.distributed, by collective."""
    sent: dict[str, int] = {}

    def counted(name: str, place: int) -> Callable:
        own = getattr(dist, name)

        def call(*args, **kwargs):
            sent[name] = sent.get(name, 0) + args[place].numel() * args[place].itemsize
            return own(*args, **kwargs)

        return call

    places = {"all_reduce": 0, "all_gather_into_tensor": 1, "all_to_all_single": 1}
    with mock.patch.multiple(dist, **{name: counted(name, place) for name, place in places.items()}):
        yield sent


def measure(method: str, num_classes: int, repeats: int, path: Path) -> None:
    """Runs in each process; the first writes the record."""
    dist.init_process_group("gloo")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps, times = Steps(method, num_classes), []
    steps.run()
    with bytes_sent() as sent:
        for _ in range(steps.number_timed):
            steps.run()
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps.number_timed):
            steps.run()
        times.append(1e3 * (time.perf_counter() - start) / steps.number_timed)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    bytes_of_a_step = sum(sent.values()) / steps.number_timed
    found = torch.tensor([statistics.median(times), peak, bytes_of_a_step], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        ms, peak, number = found.tolist()
        record = {"method": method, "classes": num_classes, "processes": dist.get_world_size(), "features": FEATURES}
        path.write_text(json.dumps(record | {"ms": ms, "peak_mb": peak, "bytes": int(number)}))
    dist.destroy_process_group()


def launch(method: str, num_classes: int, processes: int, repeats: int) -> dict:
    """Starts the processes of a measurement, and returns the record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        setting = ["--measure", method, str(num_classes), str(repeats), str(path)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        finished = subprocess.run([*start, __file__, *setting], env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{method} with {num_classes} classes failed:\n{finished.stderr[-3000:]}")
        return json.loads(path.read_text())


def estimate() -> list[dict]:
    """Memory of a card, and bytes and network time of a step with stored targets, by method.

    The wire is that of the head alone, in float32 with int32 class ids; a card receives what all cards send. The
    sampled terms count the default proposal with a class mass sampled for the wire.
    """
    held, everyone = CLASSES / CARDS * CARD_FEATURES * 4, CARDS * CARD_ITEMS
    shared, columns = SPEC.num_shared_classes, SPEC.num_sampled_classes + SPEC.num_shared_classes
    features = 2 * 4 * everyone * CARD_FEATURES
    merged = everyone * (8 + 4 * (2 * 2 + 4))  # the label, two maxima and sums, four sums over classes
    stored = everyone * (DEPTH + STORED) * 16
    sampled = 4 * (everyone * SPEC.num_sampled_classes + CARDS * shared) + 2 * 4 * everyone * columns
    # The mass and the signal of sampled classes; of tails the largest densities, the classes and their probabilities.
    learnt = CARDS * (12 * MASS_POINTS + 16 * shared + 8 * shared + 12 * shared)
    wires = {
        "exact": features + merged + stored,
        "partial_fc": features + merged,
        "dis": features + sampled + learnt,
    }
    chosen = SHARE * CLASSES / CARDS
    touched = everyone * SPEC.num_sampled_classes + CARDS * shared
    beside = {
        "exact": held + BLOCK_BYTES,  # a dense gradient and a tile
        "partial_fc": 4 * chosen * (2 * CARD_FEATURES + 2 * everyone),
        "dis": CLASS_BYTES * CLASSES / CARDS + 4 * CARD_FEATURES * touched,
    }
    return [
        {
            "method": method,
            "head_gb": 3 * held / 1e9,
            "step_gb": beside[method] / 1e9,
            "wire_mb": wires[method] / 1e6,
            "wire_ms": 1e3 * wires[method] / WIRE,
        }
        for method in METHODS
    ]


def print_estimate() -> None:
    """Prints the table of docs/distributed.md."""
    print(header("method", "rows and moments, GB", "a step beside, GB", "wire, MB per step", "at 400 Gb/s, ms"))
    for one in estimate():
        print(row(*(value if isinstance(value, str) else f"{value:.1f}" for value in one.values())))


def print_table(records: list[dict]) -> None:
    """Time, memory and bytes by processes, classes and method."""
    print(header("processes", "classes", "method", "ms", "peak MB per process", "bytes per step"))
    for one in sorted(records, key=lambda one: (one["processes"], one["classes"], METHODS.index(one["method"]))):
        shown = (f"{one[name]:,.0f}" for name in ("ms", "peak_mb", "bytes"))
        print(row(one["processes"], f"{one['classes']:,}", one["method"], *shown))


def main() -> None:
    """Runs the script."""
    made = parser(__doc__)
    made.add_argument("--classes", type=int, nargs="*", default=[1_000_000, 4_000_000, 16_000_000])
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    made.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    made.add_argument("--estimate", action="store_true", help="print the estimate, and run nothing")
    made.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)  # of the processes that the script starts
    arguments = parse(made)
    if arguments.measure:
        method, num_classes, repeats, path = arguments.measure
        measure(method, int(num_classes), int(repeats), Path(path))
        return
    if arguments.estimate:
        print_estimate()
        return
    if arguments.json is None:
        made.error("--json is needed: the file of the records, which a later call continues")
    print(machine(arguments.device), flush=True)
    done = {tuple(one[name] for name in KEY) for one in read(arguments.json)}
    for key in product(arguments.processes, arguments.classes, arguments.methods):
        if key not in done:
            processes, num_classes, method = key
            record = launch(method, num_classes, processes, arguments.repeats)
            append(arguments.json, {**record, "command": command()}, arguments.device)
    print_table(read(arguments.json))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
