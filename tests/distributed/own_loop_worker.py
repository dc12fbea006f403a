"""Runs of test_own_loop_ddp in one process and, forked by launch.py, in two: loops without a Trainer."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from equality_worker import SamplesByLabel
from tiny_models import labelled_tokens, llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_dis import DISArguments, Distiller, build_distiller
from hf_dis.distributed import average_rows
from hf_dis.distributed.processes import kept_from_ddp, num_processes, process_index

CLASSES, WINDOW, STEPS = 40, 8, 3  # examples of an optimizer step
WITHOUT_ITEMS = 1  # the step in which the second half of the examples has no supervised token
# One tail: which items share one of several tails depends on the order of the items in a batch.
SAMPLED = {"head_mode": "sampled", "num_sampled_classes": 6, "num_tails": 1, "rank_depth": 10}
CASES = {
    "exact": {"head_mode": "exact"},
    "per item": {**SAMPLED, "proposal": "teacher", "num_shared_classes": 0},
    "shared": {**SAMPLED, "proposal": "uniform", "num_shared_classes": 8},
    "row-sparse": {
        **SAMPLED,
        "proposal": "uniform",
        "num_shared_classes": 8,
        "row_sparse_head": True,
        "num_updated_classes": CLASSES,
    },
    "teacher": {**SAMPLED, "proposal": "teacher", "num_shared_classes": 8},
    "dis": {**SAMPLED, "proposal": "dis", "num_shared_classes": 8},
}
LEARNS = ("teacher", "dis")  # between the micro-batches of a step too, so these cases are not accumulated
ACCUMULATION = (1, 2)  # micro-batches of a process per step


def micro_batches(step: int, number: int) -> list[dict[str, Tensor]]:
    """The part of this process of a step's examples, in some batches."""
    data = labelled_tokens(WINDOW, CLASSES, seed=step)
    for example in data[WINDOW // 2 :] if step == WITHOUT_ITEMS else []:
        example["labels"] = torch.full_like(example["labels"], -100)
    data[0]["labels"][:4] = -100  # different numbers of items on the processes
    whole = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    parts = {name: values.chunk(num_processes() * number) for name, values in whole.items()}
    mine = range(process_index() * number, (process_index() + 1) * number)
    return [{name: values[part] for name, values in parts.items()} for part in mine]


def wide(model: nn.Module) -> nn.Module:
    """The model in float64 throughout: transformers' own RMSNorm rounds to float32."""
    for layer in [model.model, *model.model.layers]:
        for name, norm in list(layer.named_children()):
            if isinstance(norm, LlamaRMSNorm):
                setattr(layer, name, nn.RMSNorm(len(norm.weight), norm.variance_epsilon))
    return model.double()


def engine(case: str) -> tuple[nn.Module, Distiller]:
    student = wide(llama(CLASSES)).train()
    teacher = wide(llama(CLASSES, seed=1, spread=30))
    distiller = build_distiller(student, teacher, DISArguments(hard_label_weight=0.3, **CASES[case]))
    distiller.sampler.__class__ = SamplesByLabel
    return student, distiller


def seen(model: nn.Module, distiller: Distiller, step: int, losses: list[float]) -> dict:
    """The gradient before the optimizer's step, the proposal after learning, and the loss of this process."""
    gradients = {name: parameter.grad.to_dense().clone() for name, parameter in model.named_parameters()}
    proposal = {name: value.clone() for name, value in distiller.sampler.proposal.state_dict().items()}
    return {"gradients": gradients, "proposal": proposal, "loss": sum(losses), "step": step}


def torch_loop(case: str, accumulation: int) -> list[dict]:
    """DistributedDataParallel, or the model itself in one process."""
    student, distiller = engine(case)
    model = student
    if num_processes() > 1:
        row_sparse_layers = distiller.head_layers if distiller.row_sparse else ()
        with kept_from_ddp(student, row_sparse_layers):
            model = DistributedDataParallel(student)
    history = []
    for number in range(STEPS):
        batches, losses = micro_batches(number, accumulation), []
        num_items = torch.tensor(sum(map(distiller.count, batches)))
        if num_processes() > 1:
            dist.all_reduce(num_items)
        for batch in batches:
            is_last = batch is batches[-1]
            with nullcontext() if is_last or model is student else model.no_sync(), distiller.step(batch) as step:
                loss, terms = step.loss(model(**step.inputs))
                (loss.sum() / num_items * num_processes()).backward()
            losses.append(float(loss.detach().sum() / num_items))
            assert len(loss) == len(terms["kd_loss"]) == distiller.count(batch)
        if distiller.row_sparse:
            average_rows(distiller.head.parameters())
        history.append(seen(student, distiller, number, losses))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.sub_(0.1 * parameter.grad.to_dense())
                parameter.grad = None
    return history


def accelerate_loop(case: str, accumulation: int) -> list[dict]:
    """Accelerate's own wrapper, backward and gradient accumulation."""
    # The loop has no data loader of accelerate, which remembers those of earlier trainings in the process.
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    student, distiller = engine(case)
    model, optimizer = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.1))
    history = []
    for number in range(STEPS):
        batches, losses = micro_batches(number, accumulation), []
        num_items = accelerator.reduce(torch.tensor(sum(map(distiller.count, batches))))
        for batch in batches:
            with accelerator.accumulate(model), distiller.step(batch) as step:
                loss, _ = step.loss(model(**step.inputs))
                # Accelerate divides by the accumulation steps, and averages over processes.
                accelerator.backward(loss.sum() / num_items * accelerator.num_processes * accumulation)
                losses.append(float(loss.detach().sum() / num_items))
                if accelerator.sync_gradients:
                    history.append(seen(student, distiller, number, losses))
                optimizer.step()
                optimizer.zero_grad()
    return history


LOOPS = {"torch": torch_loop, "accelerate": accelerate_loop}
RUNS = [
    (case, loop, accumulation)
    for case, loop, accumulation in product(CASES, LOOPS, ACCUMULATION)
    if not (case in LEARNS and accumulation > 1) and (case, loop) != ("row-sparse", "accelerate")
]


def run(folder: Path) -> None:
    results = {"world_size": num_processes()}
    for case, loop, accumulation in RUNS:
        results[case, loop, accumulation] = LOOPS[loop](case, accumulation)
    torch.save(results, folder / f"rank_{process_index()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(Path(sys.argv[1]))
    dist.destroy_process_group()
