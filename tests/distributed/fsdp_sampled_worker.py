"""Runs of test_fsdp_sampled, forked by launch.py: steps on sampled classes of students whose heads FSDP2 shards."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from equality_worker import SamplesByLabel, dense
from fsdp_heads_worker import batch
from sharded_head_worker import bytes_sent, student, teacher
from tiny_models import bert_mlm, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_dis import DISArguments, Distiller, RowSparseAdamW, build_distiller
from hf_dis.distributed import average_rows
from hf_dis.head.fsdp_rows import FsdpRows, StepNumbers
from hf_dis.head.row_gradients import clip_grad_norm_
from hf_dis.head.spread_rows import local, spread_as
from hf_dis.models.fsdp_units import KeptSharded
from hf_dis.sampling.designs import Updates

STEPS, STARTS = 3, 64
ADAMW = {"eps": 1e-2, "weight_decay": 0.1}
SAMPLED = {"head_mode": "sampled", "num_sampled_classes": 6, "num_shared_classes": 8, "num_tails": 1}
MODES = {
    "one tail": SAMPLED | {"proposal": "uniform"},
    "two tails": SAMPLED | {"proposal": "uniform", "num_tails": 2},
    "per item": SAMPLED | {"proposal": "teacher", "num_shared_classes": 0},
}
# All sampled classes update the head.
MODES |= {f"{name}, row-sparse": MODES[name] | {"row_sparse_head": True} for name in ("two tails", "per item")}
MODES["two tails, row-sparse"]["num_updated_classes"] = 1000
# The head in a unit of its own, with another layer, or with the rest of the model.
UNITS = ("own", "pair", "root")
WAYS = ("rows", "features")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SIZES = 2**12, 2**14
TIED = 400  # classes of a head that is tied to an embedding, of which few are touched


def cases() -> list[tuple[str, ...]]:
    """Task, mode, unit, way and type; the second process has no item in the first step of the tokens."""
    return [
        ("token classification", "one tail", "root", "rows", "float64"),
        ("token classification", "one tail", "root", "features", "float64"),
        ("image", "per item", "own", "rows", "float32"),
        ("image", "per item", "pair", "features", "float32"),
        ("token classification", "two tails, row-sparse", "root", "rows", "float64"),
        ("token classification", "two tails, row-sparse", "root", "features", "float64"),
        ("image", "per item, row-sparse", "own", "rows", "float32"),
    ]


def slow_cases() -> list[tuple[str, ...]]:
    every = [
        (task, mode, unit, way, dtype)
        for task in ("image", "token classification")
        for mode in MODES
        for unit in UNITS
        for way in WAYS
        for dtype in DTYPES
    ]
    return [case for case in every if case not in cases() and (case[0], case[2]) != ("token classification", "pair")]


def shard(model: nn.Module, unit: str, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    given = {} if policy is None else {"mp_policy": policy}
    if unit == "own":
        fully_shard(model.classifier, **given)
    elif unit == "pair":
        fully_shard([model.vit.layernorm, model.classifier], reshard_after_forward=False, **given)
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        fully_shard(layer, **given)
    return fully_shard(model, **given)


def taking(way: str | None):
    """Lets the steps take one of the two ways, whichever sends fewer bytes."""
    if way is None:
        return nullcontext()
    return mock.patch.multiple(
        StepNumbers, bytes_of_rows=lambda _: way == "features", bytes_of_features=lambda _: way == "rows"
    )


def made(model: nn.Module, task: str, mode: str, num_classes: int = 41) -> Distiller:
    arguments = DISArguments(hard_label_weight=0.3, **MODES[mode])
    dtype = next(model.parameters()).dtype
    distiller = build_distiller(model, teacher(task, num_classes).to(dtype), arguments)
    distiller.sampler.__class__ = SamplesByLabel
    return distiller


def whole(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: one.full_tensor() if isinstance(one, DTensor) else one.clone() for name, one in tensors.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return whole({name: dense(one) for name, one in model.named_parameters()})


def train(case: tuple[str, ...], is_sharded: bool) -> dict[str, Tensor]:
    """Some steps of two micro-batches on the items of all processes; a whole student takes those of each in turn."""
    task, mode, unit, way, dtype = case
    model = student(task, False).to(DTYPES[dtype]).train()
    if is_sharded:
        shard(model, unit)
    distiller = made(model, task, mode)
    # The row-sparse gradients of whole students too are those of rows that a process has.
    by_row = distiller.row_sparse
    optimizer = (RowSparseAdamW if by_row else torch.optim.SGD)(
        model.parameters(), lr=0.1, **(ADAMW if by_row else {})
    )
    number, rank = dist.get_world_size(), dist.get_rank()
    losses, kept = [], []
    with taking(way), counting(kept):
        for step_number in range(STEPS):
            for micro in (2 * step_number, 2 * step_number + 1):
                batches = [cast(batch(task, micro % 3, other), DTYPES[dtype]) for other in range(number)]
                items = sum(map(distiller.count, batches))
                if is_sharded:
                    model.set_requires_gradient_sync(micro % 2 == 1)
                for one in [batches[rank]] if is_sharded else batches:
                    with distiller.step(one) as step:
                        loss = step.loss(model(**step.inputs))[0].sum() / max(1, items)
                        (loss * number if is_sharded else loss).backward()
                    losses.append(loss.detach())
            if by_row:
                average_rows(distiller.head.parameters(), over_processes=False)
                clip_grad_norm_(model.parameters(), 0.05)  # clips
            found = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    # Weight and bias, in the comparison before the first step and in each micro-batch.
    assert kept == ([2] * (1 + 2 * STEPS) if is_sharded else [])
    losses = torch.stack(losses).sum()
    if is_sharded:
        dist.all_reduce(losses)
    return {"loss": losses} | found | {f"student.{name}": one for name, one in whole(model.state_dict()).items()}


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}


def counting(kept: list[int]):
    """Lists the numbers of parameters that units were kept from gathering."""
    own = KeptSharded.__init__

    def init(self, *args):
        own(self, *args)
        kept.append(self.found)

    return mock.patch.object(KeptSharded, "__init__", init)


def gathering():
    """Lets FSDP2 gather the head in a step on sampled classes too."""
    return mock.patch.object(FsdpRows, "of", lambda *_: None)


def mixed(is_gathered: bool, mode: str = "one tail") -> dict[str, Tensor]:
    """The gradients of a step in bfloat16; with a head that FSDP2 gathers, for comparison."""
    model = student("image", False).float().train()
    shard(model, "pair", MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    distiller = made(model, "image", mode)
    inputs = cast(batch("image", 0, dist.get_rank()), torch.float32)
    with gathering() if is_gathered else nullcontext(), distiller.step(inputs) as step:
        outputs = model(**step.inputs)
        assert outputs.logits.dtype == torch.bfloat16
        step.loss(outputs)[0].sum().backward()
    return gradients(model)


def tied(mode: str = "one tail") -> list[dict[str, Tensor]]:
    """The gradients of a masked language model whose head has a bias and shares its weight; and of a whole one."""
    found, number, rank = [], dist.get_world_size(), dist.get_rank()
    batches = [tokens(3, 41, seed=other) for other in range(number)]
    for one in batches:
        one["input_ids"][:, 0] = 0  # padding
        one["labels"] = one["input_ids"].masked_fill(one["input_ids"] == 0, -100)
    for is_sharded in (True, False):
        model = bert_mlm(TIED).double().train()
        assert model.bert.embeddings.word_embeddings.padding_idx == 0
        if is_sharded:
            fully_shard(model)
        distiller = build_distiller(model, bert_mlm(TIED, seed=1, spread=30).double(), DISArguments(**MODES[mode]))
        distiller.sampler.__class__ = SamplesByLabel
        kept: list[int] = []
        with counting(kept):
            for one in [batches[rank]] if is_sharded else batches:
                with distiller.step(one) as step:
                    loss = step.loss(model(**step.inputs))[0].sum()
                    (loss if is_sharded else loss / number).backward()
        assert kept == ([2, 2] if is_sharded else [])
        found.append(gradients(model) | whole({"touched": touched(model.cls.predictions.decoder.weight)}))
    return found


def touched(parameter: nn.Parameter) -> Tensor:
    """One for each row in the gradient of a parameter, also if the gradient is zero there."""
    gradient, mask = local(parameter.grad), torch.zeros(len(local(parameter)))
    ids = gradient._indices()[0] if gradient.is_sparse else slice(None)
    mask[ids] = 1
    return spread_as(parameter, mask)


def updated(way: str) -> dict[str, Tensor]:
    """The gradient of sampled logits, and the mean of those of a sample of the classes that update the head."""
    model = shard(student("image", False).train(), "root")
    model(pixel_values=batch("image", 0, 0)["pixel_values"])  # sets FSDP2 up
    random = torch.Generator().manual_seed(dist.get_rank())
    features, item_ids = torch.randn(4, 16, generator=random).double(), torch.randint(41, (4, 3), generator=random)
    tail_ids, found = torch.randperm(41, generator=random)[:8].sort().values[None], {}
    rows = FsdpRows.of(model, model.classifier, row_sparse=True)
    with taking(way):
        for name, number in (("all", 1000), ("sampled", 6)):
            for place in range(STARTS):
                updates = Updates(number, (place + 0.5) / STARTS)
                rows.sampled(features, item_ids, tail_ids, updates=updates).square().sum().div(STARTS).backward()
                if place == 0:
                    found[f"{name}.touched"] = torch.tensor(local(model.classifier.weight.grad)._nnz())
            found |= {f"{name}.{own}": dense(one) for own, one in model.classifier.named_parameters()}
            model.zero_grad()
    rows.release()
    return whole(found)


def step_bytes(num_classes: int, way: str | None, is_gathered: bool = False) -> int:
    """The bytes of a step for a number of classes."""
    model = shard(student("image", False, num_classes).float().train(), "root")
    distiller = made(model, "image", "one tail", num_classes)
    inputs = cast(batch("image", 0, dist.get_rank()), torch.float32)
    with taking(way), gathering() if is_gathered else nullcontext():
        for _ in range(2):  # comparisons of the first step are done
            with bytes_sent() as sent, distiller.step(inputs) as step:
                step.loss(model(**step.inputs))[0].sum().backward()
    return sum(sent.values())


def evaluated() -> list[Tensor]:
    """Logits of all classes between two steps on sampled classes, and those of a whole student."""
    models = [student("image", False).train(), shard(student("image", False).train(), "pair")]
    distiller, own = made(models[1], "image", "one tail"), batch("image", 0, dist.get_rank())
    found = []
    for _ in range(2):
        with distiller.step(own) as step:
            step.loss(models[1](**step.inputs))[0].sum().backward()
        with torch.no_grad():
            found.append(models[1].eval()(pixel_values=own["pixel_values"]).logits)
        models[1].train()
    return [*found, models[0].eval()(pixel_values=own["pixel_values"]).logits.detach()]


def run(folder: Path, kind: str) -> None:
    dist.init_process_group("gloo")
    results, chosen = {"world_size": dist.get_world_size()}, cases() if kind == "fast" else slow_cases()
    for task, mode, dtype in sorted({(case[0], case[1], case[4]) for case in chosen}):
        alike = [case for case in chosen if (case[0], case[1], case[4]) == (task, mode, dtype)]
        expected = train(alike[0], False)
        for case in sorted(alike):
            results[case] = train(case, True), expected
    if kind == "fast":
        results["tied"] = tied()
        results["tied, row-sparse"] = tied("two tails, row-sparse")
        results["updated"] = {way: updated(way) for way in WAYS}
        results["mixed"] = [mixed(is_gathered) for is_gathered in (False, True)]
        results["mixed, row-sparse"] = mixed(False, "two tails, row-sparse"), mixed(True, "two tails")
        results["bytes"] = {way: [step_bytes(number, way) for number in SIZES] for way in (*WAYS, None)}
        results["bytes", "gathered"] = [step_bytes(number, None, True) for number in SIZES]
        results["evaluated"] = evaluated()
    torch.save(results, folder / f"rank_{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2])
