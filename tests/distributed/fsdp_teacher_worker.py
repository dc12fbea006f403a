"""Runs of test_fsdp_teacher, forked by launch.py: teachers that FSDP2 shards, beside whole ones in the same runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import tensor_parallel_worker as models
import torch
import torch.distributed as dist
from accelerate import PartialState
from equality_worker import data
from sharded_head_worker import bytes_sent
from tensor_parallel_worker import gradients, whole
from tiny_models import bart, bert_mlm, bert_tokens, gpt2, llama, llama_sequences, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from hf_dis import (
    DISArguments,
    DISConfig,
    DISDistillationTrainer,
    Distiller,
    TeacherCache,
    build_distiller,
    cache_teacher_targets,
)
from hf_dis.items import Items, token_items
from hf_dis.teacher import targets
from hf_dis.teacher.online import OnlineTeacher

C, STEPS, EXAMPLES = 41, 5, 8  # of a process in a step
CHUNK = 3  # items
MODES = {"sampled": models.SAMPLED, "exact": models.SAMPLED | {"head_mode": "exact"}}
# Student, mode, divergence and unit of the teacher's head; two steps of "sampled" are a warm-up.
CASES = [
    ("DDP", "sampled", "forward_kl", "own"),
    ("DDP", "sampled", "reverse_kl", "root"),
    ("DDP", "exact", "forward_kl", "pair"),
    ("FSDP2", "sampled", "forward_kl", "pair"),
    ("FSDP2", "sampled", "reverse_kl", "own"),
    ("FSDP2", "exact", "reverse_kl", "root"),
    ("tensor parallel", "sampled", "forward_kl", "transformers"),
]
BUILDS = {"untied": llama, "tied": gpt2, "tied, with a bias": bert_mlm, "bias after the head": bart}
ANSWERS = [(name, unit) for name in BUILDS for unit in ("own", "root")]
# The units of tied weights have to be the root.
ANSWERS = [(name, unit) for name, unit in ANSWERS if name == "untied" or unit == "root"]
ANSWERS += [("untied", unit) for unit in ("pair", "copies")]


def shard(model: nn.Module, unit: str, **keywords) -> nn.Module:
    """Shards a model, its head in the root, a unit of its own, or one with the last norm; or copies of all parts."""
    if unit == "copies":
        keywords["mesh"] = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))
    if unit in ("own", "copies"):
        fully_shard(model.lm_head, **keywords)
    elif unit == "pair":
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **keywords)
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        fully_shard(layer, **keywords)
    return fully_shard(model, **keywords)


def in_chunks():
    """Lets teachers answer in chunks of a few items, of which processes have different numbers."""
    return mock.patch.object(targets, "CHUNK_ELEMENTS", CHUNK * C)


# Trainings


def batch(step: int, kind: str) -> dict[str, Tensor]:
    """The second process has no item in every other step; tensor-parallel processes have the same items."""
    first = (step % 2 * 2 + (0 if kind == "tensor parallel" else dist.get_rank())) * EXAMPLES
    examples = data("causal LM")[first : first + EXAMPLES]
    return {name: torch.stack([one[name] for one in examples]) for name in examples[0]}


def made(folders: dict[str, Path], case: tuple[str, ...], is_sharded: bool) -> tuple[nn.Module, Distiller]:
    kind, mode, divergence, unit = case
    sizes = {"fsdp_size": 2} if unit == "transformers" else {}
    teacher = models.load(folders["teacher"], is_sharded and bool(sizes), **sizes)
    if is_sharded and not sizes:
        shard(teacher, unit)
    student = models.load(folders["untied"], kind == "tensor parallel").train()
    if kind == "FSDP2":
        shard(student, "own")
    distiller = build_distiller(student, teacher, DISArguments(divergence=divergence, **MODES[mode]))
    assert type(distiller.teacher) is OnlineTeacher
    return DistributedDataParallel(student) if kind == "DDP" else student, distiller


def keep_gradient(kept: list[Tensor], module: nn.Module, args: tuple, features: Tensor) -> None:
    """Keeps the gradient of the features, in a forward that has one."""
    if features.requires_grad:
        features.register_hook(lambda gradient: kept.append(gradient.clone()))


def train(folders: dict[str, Path], case: tuple[str, ...], is_sharded: bool) -> dict[str, Tensor]:
    """Some steps and an evaluation."""
    model, distiller = made(folders, case, is_sharded)
    student, optimizer = distiller.student, torch.optim.SGD(model.parameters(), lr=0.1)
    found, kept = {}, []
    student.model.norm.register_forward_hook(partial(keep_gradient, kept))
    copies = 1 if case[0] == "tensor parallel" else dist.get_world_size()
    for number in range(STEPS):
        own = batch(number, case[0])
        items = torch.tensor(distiller.count(own))
        found[f"items {number}"] = items.clone()
        if copies > 1:
            dist.all_reduce(items)
        with distiller.step(own, warming_up=number < 2, holds_logits=False) as step:
            loss, _ = step.loss(model(**step.inputs))
            (loss.sum() / items * copies).backward()
        found[f"loss {number}"] = loss.detach()
        found[f"features {number}"] = kept.pop()
        found |= {f"gradient {number} of {name}": one for name, one in gradients(student).items()}
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), distiller.step(batch(1, case[0]), holds_logits=False) as step:
        loss, terms = step.loss(model(**step.inputs))
    found |= {"evaluated": loss} | {f"evaluated {name}": one for name, one in terms.items()}
    return found | whole(dict(student.named_parameters())) | distiller.sampler.state_dict()


def asked_alone(folders: dict[str, Path]) -> str:
    """The error of an exact step whose items count differently."""
    model, distiller = made(folders, ("whole", "exact", "forward_kl", "own"), True)
    with distiller.step(batch(1, ""), holds_logits=False) as step:
        loss, _ = step.loss(model(**step.inputs))
        return error(lambda: (loss * torch.arange(len(loss))).sum().backward())


# Answers of a teacher


def teacher(name: str) -> nn.Module:
    return BUILDS[name](C, seed=1, spread=30).double().eval()


def inputs_of(model: nn.Module) -> tuple[dict[str, Tensor], Items]:
    """A batch of a process; the second one has no item."""
    rank = dist.get_rank()
    inputs = tokens(5, C, seed=rank)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    return inputs, token_items(torch.full_like(labels, -100) if rank else labels, None, labels.shape, False)


def logits(model: nn.Module, num_classes: int = C, **keywords) -> Tensor:
    found = list(OnlineTeacher(model, num_classes, 2.0, 5, CHUNK, **keywords).all_classes(*inputs_of(model)))
    assert len(found) == (1 if dist.get_rank() else 10)
    return torch.cat(found)


def answers(name: str, unit: str) -> dict:
    """Logits and digests of a whole teacher and of a sharded one, and the bytes of an answer and of a forward."""
    expected, model = OnlineTeacher(teacher(name), C, 2.0, 5), shard(teacher(name), unit)
    online = OnlineTeacher(model, C, 2.0, 5, CHUNK)
    assert online.fingerprint == expected.fingerprint  # before the first forward
    del online.fingerprint
    inputs, items = inputs_of(model)
    list(online.all_classes(inputs, items))  # the comparison is done
    with bytes_sent() as sent, CommDebugMode() as asked:
        found = torch.cat(list(online.all_classes(inputs, items)))
    assert all(isinstance(one, DTensor) for one in model.parameters())  # nothing is held
    with torch.no_grad(), bytes_sent() as of_forward, CommDebugMode() as asked_by_forward:
        model(**inputs)
    return {
        "logits": [{"": found}, {"": torch.cat(list(expected.all_classes(inputs, items)))}],
        "fingerprints": [online.fingerprint, expected.fingerprint],
        "bytes": [sum(sent.values()), sum(of_forward.values())],
        "collectives": [asked.get_total_counts(), asked_by_forward.get_total_counts()],
    }


def mixed() -> list[dict[str, Tensor]]:
    """Logits in bfloat16, by autocast and by a policy of FSDP2, each after those of a whole teacher."""

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    given = [
        (teacher("untied").float(), autocast),
        (shard(teacher("untied").float(), "own"), autocast),
        (teacher("untied").bfloat16(), None),
        (shard(teacher("untied").float(), "own", mp_policy=policy), None),
    ]
    return [{"": logits(model, **({} if one is None else {"context": one}))} for model, one in given]


class DiffersOnce(LlamaForCausalLM):
    """Rescales its logits on the second process."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if dist.get_rank() == 1:
            outputs.logits = outputs.logits * 2
        return outputs


class Plain(nn.Module):
    """A model that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.body = llama(C)

    def forward(self, **inputs):
        return self.body(**inputs)


def error(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as caught:
        return str(caught)
    return "no error"


def refusals() -> dict[str, str]:
    sequences = llama_sequences(C)
    given = {
        "differs on a process": DiffersOnce(llama(C).config),
        "picks tokens": sequences,
        "no model of transformers": Plain(),
    }
    found = {}
    for name, model in given.items():
        fully_shard(model.eval())
        inputs = tokens(5, C, seed=dist.get_rank())
        items = Items(5) if model is sequences else token_items(None, inputs["attention_mask"], (5, 6), False)
        online = OnlineTeacher(model, C, 2.0, 5)
        found[name] = error(lambda one=online, given=(inputs, items): list(one.all_classes(*given)))
    return found


# A cache, and a Trainer


def cached(folder: Path, is_sharded: bool, examples: list[dict], shard_examples: int) -> dict:
    model = bert_tokens(C, seed=1, spread=30).double()
    if is_sharded:
        fully_shard(model.classifier)
        fully_shard(model)
    given = {"depth": 8, "sample_size": 6, "show_progress": False, "batch_size": 4}
    cache_teacher_targets(model, examples, folder, shard_examples=shard_examples, **given)
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".arrow"}
    return files | {"header": TeacherCache(folder).header.teacher}


def trained(folders: dict[str, Path], folder: Path, is_sharded: bool) -> dict:
    """A training by a Trainer with plain data parallelism, and its checkpoint."""
    examples = data("causal LM")
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "logging_steps": 1, "report_to": "none"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.02, "per_device_train_batch_size": 4}
    trainer = DISDistillationTrainer(
        models.load(folders["untied"], False),
        models.load(folders["teacher"], is_sharded, fsdp_size=2),
        DISConfig(output_dir=str(folder), **settings, **models.SAMPLED),
        train_dataset=examples,
        eval_dataset=examples[:13],
    )
    trainer.train()
    losses = [value for log in trainer.state.log_history for name, value in log.items() if name.endswith("loss")]
    metrics = trainer.evaluate()
    return {
        "student": whole(dict(trainer.model.named_parameters())),
        "losses": [*losses, metrics["eval_loss"], metrics["eval_kl"]],
        "manifest": (folder / "checkpoint-2" / "dis_checkpoint.json").read_text(),
        "files": sorted(path.name for path in (folder / "checkpoint-2").iterdir()),
    }


def run(folder: Path) -> None:
    PartialState(cpu=True)
    results, rank = {"world_size": dist.get_world_size()}, dist.get_rank()
    folders = models.saved(folder)
    with in_chunks():
        for case in CASES:
            results[case] = [train(folders, case, is_sharded) for is_sharded in (True, False)]
        results["asked alone"] = asked_alone(folders)
        results["trained"] = [trained(folders, folder / f"out {one}", one) for one in (True, False)]
    for case in ANSWERS:
        results[("answers", *case)] = answers(*case)
    results["mixed"], results["refusals"] = mixed(), refusals()
    examples = data("token classification")
    # Five shards, of which one process writes three and the other one two; and one shard of one process alone.
    for size, number in ((9, 44), (50, 10)):
        results["cached", size] = [
            cached(folder / f"cache {size} {one}", one, examples[:number], size) for one in (True, False)
        ]
    torch.save(results, folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
