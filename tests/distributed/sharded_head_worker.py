"""Runs of test_sharded_head in one process and, forked by launch.py, in two and four: trainings of sharded heads.

Each training is run with a whole head too, which ``DistributedDataParallel`` averages.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from equality_worker import Keeps, SamplesByLabel, data
from tiny_models import bert_tokens, vit
from torch import Tensor, nn

from hf_dis import DISConfig, DISDistillationTrainer, TeacherCache, cache_teacher_targets
from hf_dis.head.sharded import ShardedHead, shard_head, sharded_heads
from hf_dis.sampling.class_memory import CLASS_STATE

C, WINDOW, EXAMPLES, STEPS = 41, 16, 48, 5
TASKS = {"image": vit, "token classification": bert_tokens}
TEACHERS = ("online", "cached")
CACHED = {"depth": 8, "sample_size": 6, "show_progress": False}
DIVERGENCES = ("forward_kl", "reverse_kl")
GRADIENTS = {
    "dense": {"optim": "sgd", "learning_rate": 0.1},
    "row-sparse": {"row_sparse_head": True, "optim": "adamw_torch", "learning_rate": 0.02, "adam_epsilon": 1e-3},
}
MODES = {
    "sampled": {},
    "per item": {"num_shared_classes": 0},
    "warm-up": {"exact_warmup_steps": 2},
    "exact": {"head_mode": "exact"},
}
# The same samples for every number of processes; a proposal that learns sums its statistics in float32.
ONE_SAMPLE = {"own_samples": False, "num_tails": 1, "proposal": "uniform"}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}


def settings(**keywords) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return {
        "per_device_train_batch_size": WINDOW // processes,
        "train_sampling_strategy": "sequential",
        "max_steps": STEPS,
        "max_grad_norm": 0.05,  # clips
        "save_strategy": "no",
        "head_mode": "sampled",
        "num_sampled_classes": 6,
        "num_shared_classes": 8,
        "num_updated_classes": 1000 if keywords.get("row_sparse_head") else None,
        "logging_steps": 1,
        "hard_label_weight": 0.3,
        **QUIET,
        **keywords,
    }


def examples(task: str, dtype: torch.dtype = torch.float64) -> list[dict]:
    """Labelled examples; of the tokens the second half of the first window has none that is supervised."""
    items = [{name: of_type(value, dtype) for name, value in item.items()} for item in data(task)]
    items = (items + items)[:EXAMPLES]
    for number, item in enumerate(items):
        item["labels"] = item["labels"] if task != "image" else (3 * number) % C
    return items


def of_type(value: Tensor | int, dtype: torch.dtype) -> Tensor | int:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def student(task: str, is_sharded: bool, num_classes: int = C) -> nn.Module:
    model = TASKS[task](num_classes).double()
    if is_sharded:
        shard_head(model, "classifier")
    return model


def teacher(task: str, num_classes: int = C, is_sharded: bool = False) -> nn.Module:
    model = TASKS[task](num_classes, seed=1, spread=30).double()
    if is_sharded:
        shard_head(model, "classifier")
    return model


def train(
    folder: Path,
    task: str,
    is_sharded: bool,
    cache: Path | None = None,
    own_samples: bool = True,
    shards_teacher: bool = False,
    dtype: torch.dtype = torch.float64,
    **keywords,
):
    """Trains for some steps; returns the student, the gradients, the logs and the state of the optimizer."""
    given = {"teacher_model": teacher(task, is_sharded=shards_teacher).to(dtype)}
    given, items = given if cache is None else {"teacher_cache": cache}, examples(task, dtype)
    keeps = Keeps()
    trainer = DISDistillationTrainer(
        student(task, is_sharded).to(dtype),
        args=DISConfig(output_dir=str(folder), **settings(**keywords)),
        train_dataset=items,
        eval_dataset=items[:13],  # not a multiple of anything
        callbacks=[keeps],
        **given,
    )
    keeps.trainer = trainer
    if not own_samples:
        trainer.distiller.sampler.__class__ = SamplesByLabel
    trainer.train()
    head = trainer.model.classifier
    state = trainer.optimizer.state[head.weight]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "student": whole(trainer.model, dict(trainer.model.state_dict())),
        "gradients": [whole(trainer.model, gradients) for gradients in keeps.gradients],
        "logs": [{name: value for name, value in log.items() if "runtime" not in name} for log in logs],
        "metrics": {name: value for name, value in trainer.evaluate().items() if name.endswith(("loss", "kl"))},
        "moments": {name: whole_rows(head, value) for name, value in state.items() if isinstance(value, Tensor)},
        "proposal": whole_state(head, trainer.distiller.sampler.state_dict()),
    }


def whole(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, those of its sharded head joined."""
    heads = sharded_heads(model)
    return {
        name: whole_rows(heads[name.rpartition(".")[0]], value) if name.rpartition(".")[0] in heads else value.clone()
        for name, value in tensors.items()
    }


def whole_rows(head: nn.Module, rows: Tensor) -> Tensor:
    """The rows of all processes, for those of this one."""
    if not isinstance(head, ShardedHead) or head.shard.number == 1 or len(rows.shape) == 0:
        return rows.clone()
    parts = [None] * head.shard.number
    dist.all_gather_object(parts, rows.clone())
    return torch.cat(parts)


def whole_state(head: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a sampler, with what it keeps by class of all processes."""
    return {name: whole_rows(head, value) if name in CLASS_STATE else value.clone() for name, value in state.items()}


def cases() -> list[tuple[str, str, str, str]]:
    """Task, teacher, divergence and gradients; a cache serves the forward KL alone."""
    every = product(TASKS, TEACHERS, DIVERGENCES, GRADIENTS)
    return [case for case in every if case[1:3] != ("cached", "reverse_kl")]


def teacher_cases() -> list[tuple[str, str, str]]:
    """Task, divergence and mode of the trainings with a sharded teacher."""
    return [(*case, mode) for case in product(TASKS, DIVERGENCES) for mode in MODES]


@contextmanager
def bytes_sent():
    """Counts the bytes that this process gives to the collectives of torch.distributed."""
    sent = {}

    def counted(name, place):
        own = getattr(dist, name)

        def call(*args, **kwargs):
            tensor = [*args, *kwargs.values()][place]
            sent[name] = sent.get(name, 0) + tensor.numel() * tensor.itemsize
            return own(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    names = {"all_reduce": 0, "all_gather_into_tensor": 1, "all_to_all_single": 1, "broadcast": 0}
    names |= {"all_gather_single": 1, "reduce_scatter_single": 1}  # of FSDP
    patches = [counted(name, place) for name, place in names.items()]
    for patch in patches:
        patch.start()
    try:
        yield sent
    finally:
        for patch in patches:
            patch.stop()


def step_bytes(folder: Path, num_classes: int, proposal: str, shards_teacher: bool = False) -> int:
    """The bytes of the training steps of a sharded student beyond those of its body, for a number of classes."""
    trainer = DISDistillationTrainer(
        student("image", True, num_classes),
        teacher("image", num_classes, shards_teacher),
        DISConfig(output_dir=str(folder), **settings(proposal=proposal, max_steps=1)),
        train_dataset=examples("image"),
    )
    trainer.train()  # comparisons of the first step are done
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with bytes_sent() as sent, trainer.distiller.step(batch) as step:
        loss, _ = step.loss(trainer.model(**step.inputs))
        loss.sum().backward()
        learner = trainer.distiller.sampler.proposal
        assert learner.shard is (trainer.head.shard if learner.wants_class_mass else None)
    return sum(sent.values())


def run(folder: Path) -> None:
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    PartialState(cpu=True)
    results = {"world_size": processes}
    caches = {task: folder / f"cache of {task}" for task in TASKS}
    for task, path in caches.items():
        cache_teacher_targets(teacher(task), examples(task), path, **CACHED)
        # By a sharded teacher in shards of some examples, which all processes compute together.
        found = {}
        for is_sharded in (False, True):
            own = folder / f"{task}, {is_sharded}"
            cache_teacher_targets(
                teacher(task, is_sharded=is_sharded), examples(task), own, shard_examples=11, **CACHED
            )
            found[is_sharded] = {file.name: file.read_bytes() for file in own.iterdir() if file.suffix == ".arrow"}
            found[is_sharded]["header"] = TeacherCache(own).header.teacher
        results["cached by shards", task] = found[True], found[False]
    for case in cases():
        task, kind, divergence, gradients = case
        given = {"divergence": divergence, **GRADIENTS[gradients]}
        if kind == "online":
            one_sample = {**ONE_SAMPLE, **given}
            results[(*case, "one sample")] = train(folder / "out", task, True, **one_sample)
        for is_sharded in (False, True) if processes == 2 else ():
            cache = caches[task] if kind == "cached" else None
            results[(*case, is_sharded)] = train(folder / "out", task, is_sharded, cache, **given)
    for case in teacher_cases() if processes == 2 else ():
        task, divergence, mode = case
        given = {"divergence": divergence, **GRADIENTS["dense"], **MODES[mode]}
        for is_sharded in (False, True):
            run = train(folder / "out", task, True, shards_teacher=is_sharded, **given)
            results[("sharded teacher", *case, is_sharded)] = run
    for task in TASKS:
        for gradients, given in GRADIENTS.items():
            single = {**ONE_SAMPLE, **given, "dtype": torch.float32}
            results["float32", task, gradients] = train(folder / "out", task, processes > 1, **single)
        with mock.patch.object(ShardedHead, "forward", autospec=True, side_effect=ShardedHead.forward) as whole_logits:
            results["exact", task, True] = train(folder / "out", task, True, head_mode="exact")
        results["whole logits", task] = whole_logits.call_count
        warm = {"exact_warmup_steps": STEPS, "proposal": "uniform", "row_sparse_head": False}
        results["warm-up", task] = train(folder / "out", task, True, **warm)
        if processes == 1:
            one_sample = {**ONE_SAMPLE, "divergence": "reverse_kl", **GRADIENTS["row-sparse"]}
            results["one sample", task] = train(folder / "out", task, False, **one_sample)
            results["exact", task, False] = train(folder / "out", task, False, head_mode="exact")
    if processes > 1:
        sizes = {"uniform": (64, 4096), "dis": (2**15, 2**17), "teacher": (2**15, 2**17)}
        results["bytes"] = {
            proposal: [step_bytes(folder / "out", number, proposal) for number in numbers]
            for proposal, numbers in sizes.items()
        }
        results["bytes"]["sharded teacher"] = [
            step_bytes(folder / "out", number, "dis", shards_teacher=True) for number in sizes["dis"]
        ]
    torch.save(results, folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
