"""Runs of test_tensor_parallel in one process and, forked by launch.py, in two: language models with a tp_plan."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from accelerate import ParallelismConfig, PartialState
from equality_worker import Keeps, SamplesByLabel, dense
from tiny_models import labelled_tokens, llama
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hf_dis import (
    ClassSampler,
    DISArguments,
    DISConfig,
    DISDistillationTrainer,
    build_distiller,
    cache_teacher_targets,
)
from hf_dis.head.spread_rows import is_row_sparse
from hf_dis.sampling.class_memory import CLASS_STATE

V, EXAMPLES, STEPS = 41, 44, 5
TEACHERS = ("whole", "spread", "cached")
SAMPLED = {"head_mode": "sampled", "num_sampled_classes": 6, "num_shared_classes": 8, "hard_label_weight": 0.3}
MODES = {
    "sampled": SAMPLED,
    "per item": SAMPLED | {"num_shared_classes": 0},
    "warm-up": SAMPLED | {"exact_warmup_steps": 2},
    "exact": SAMPLED | {"head_mode": "exact"},
    # All rows in the first step, and all sampled rows later.
    "row-sparse": SAMPLED | {"exact_warmup_steps": 1, "row_sparse_head": True, "num_updated_classes": 1000},
}
MODES["row-sparse"] |= {"proposal": "uniform", "num_tails": 1}  # which leave rows out


def cases() -> list[tuple[bool, str, str, str]]:
    """Tied, teacher, divergence and mode; a cache serves the forward KL alone."""
    every = product((True, False), TEACHERS, ("forward_kl", "reverse_kl"), MODES)
    return [case for case in every if case[1:3] != ("cached", "reverse_kl") and (case[3] != "per item" or case[0])]


def float32_cases() -> list[tuple[bool, str, str, str]]:
    modes = "per item", "exact", "row-sparse"
    return [(is_tied, "spread", "forward_kl", mode) for is_tied in (True, False) for mode in modes]


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def saved(folder: Path, num_tokens: int = V, **config) -> dict[str, Path]:
    """The folders of the checkpoints, which the first process writes."""
    models = {
        "tied": llama(num_tokens, tie_word_embeddings=True, **config),
        "untied": llama(num_tokens, **config),
        "teacher": llama(num_tokens, seed=1, spread=30, num_hidden_layers=2, **config),
    }
    folders = {name: folder / name for name in models}
    if int(os.environ.get("RANK", 0)) == 0:
        for name, path in folders.items():
            models[name].save_pretrained(path)
    if processes() > 1:
        dist.barrier()
    return folders


def load(folder: Path, is_spread: bool = True, dtype: torch.dtype = torch.float64, **sizes: int) -> LlamaForCausalLM:
    """A model, spread over all processes or as a DistributedConfig of these sizes says."""
    config = DistributedConfig(**(sizes or {"tp_size": processes()}))
    spread = {"distributed_config": config} if is_spread and processes() > 1 else {}
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **spread)
    assert isinstance(model.lm_head.weight, DTensor) == bool(spread)
    return model


def examples(number: int = EXAMPLES) -> list[dict]:
    """Examples with different numbers of supervised tokens, some with none."""
    items = labelled_tokens(number, V)
    for place, item in enumerate(items):
        item["labels"][: place % 7] = -100
    return items


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (one.full_tensor() if isinstance(one, DTensor) else one).clone() for name, one in tensors.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return whole({name: dense(one) for name, one in model.named_parameters()})


# A step of a loop without a Trainer, in two processes


def batch(seed: int = 0) -> dict[str, Tensor]:
    items = labelled_tokens(5, V, seed=seed)
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def step(folders: dict[str, Path], is_spread: bool, divergence: str, is_tied: bool, mode: str) -> dict[str, Tensor]:
    """Two steps on one batch: loss, gradients and what the proposal learns; with whole models for comparison."""
    options = {"warming_up": mode == "warm-up", "holds_logits": False}
    by_row = mode == "row-sparse"
    student = load(folders["tied" if is_tied else "untied"], is_spread).train()
    teacher = load(folders["teacher"], is_spread)
    seed = 0 if is_spread else -dist.get_rank()  # whole students get the number of the process added
    distiller = build_distiller(student, teacher, DISArguments(divergence=divergence, **MODES[mode]), seed=seed)
    assert type(distiller.teacher).__name__ == ("ShardedTeacher" if is_spread else "OnlineTeacher")
    assert distiller.is_tensor_parallel == is_spread
    if not is_spread:
        distiller.reduce = None
    for _ in range(2):
        with distiller.step(batch(), **options) as step:
            outputs = student(**step.inputs)
            if mode == "exact":
                assert outputs.logits.shape[1] == 1  # never the logits of all classes
            loss, _ = step.loss(outputs)
            (loss * (1 + torch.arange(len(loss)))).sum().backward()  # items that count differently
            assert is_row_sparse(student.lm_head.weight.grad) == by_row
    return {"loss": loss.detach(), **gradients(student), **whole_state(distiller.sampler)}


def end_groups() -> None:
    """Ends the groups of the meshes of former models, whose threads take time from all trainings that follow."""
    for group in list(c10d._world.pg_map):
        if group is not c10d._get_default_group():
            dist.destroy_process_group(group)


def different_batches(folders: dict[str, Path]) -> str:
    student, teacher = load(folders["untied"]).train(), load(folders["teacher"], False)
    distiller = build_distiller(student, teacher, DISArguments(**SAMPLED))
    try:
        distiller.begin(batch(seed=dist.get_rank()))
    except ValueError as error:
        return str(error)
    return "no error"


def whole_state(sampler: ClassSampler) -> dict[str, torch.Tensor]:
    """The state of a sampler; what it keeps by class is joined from the processes that keep classes together."""
    state, shard = sampler.state_dict(), sampler.proposal.shard
    if shard is not None:
        for name in CLASS_STATE[:2]:
            parts = [None] * shard.number
            dist.all_gather_object(parts, state[name], shard.group)
            assert all(len(part) < V for part in parts)
            state[name] = torch.cat(parts)
    return state


def steps(folder: Path) -> dict:
    """For test_sharded_exact, whose processes run already."""
    folders = saved(folder)
    given = [("forward_kl", True, "sampled"), ("reverse_kl", False, "sampled"), ("forward_kl", False, "warm-up")]
    given += [("reverse_kl", True, "exact"), ("forward_kl", False, "exact")]
    given += [("forward_kl", True, "row-sparse"), ("reverse_kl", False, "row-sparse")]
    found = {("tensor parallel", *case): [step(folders, one, *case) for one in (True, False)] for case in given}
    return found | {"different batches": different_batches(folders)}


# Trainings


def split_alike(sampler: ClassSampler) -> None:
    """Makes the samples of items independent of their split; of a cache those that are a tail alone."""
    if type(sampler) is ClassSampler:
        sampler.__class__ = SamplesByLabel
        return
    own = sampler.sample

    def sample(*args):
        sampler.generator.manual_seed(3)
        return own(*args)

    sampler.sample = sample


def train(
    folders: dict[str, Path],
    folder: Path,
    case: tuple[bool, str, str, str],
    data: list[dict] | None = None,
    dtype: torch.dtype = torch.float64,
    one_sample: bool = False,
    sizes: dict[str, int] | None = None,
    saves: bool = True,
    **keywords,
) -> dict:
    """A training; with one_sample its samples are the same however items are split."""
    (is_tied, kind, divergence, mode), sizes, data = case, sizes or {}, data or examples()
    if kind == "cached":
        given = {"teacher_cache": folder / "cache"}
    else:
        given = {"teacher_model": load(folders["teacher"], kind == "spread", dtype, **sizes)}
    settings = {
        "output_dir": str(folder / "out"),
        "divergence": divergence,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 0.02,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.5,  # clips
        "row_sparse_head": False,  # as spread students have by default
        "logging_steps": 1,
        "save_strategy": "no",
        "save_steps": 1,
        "save_only_model": True,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **MODES[mode],
        **keywords,
    }
    keeps = Keeps()
    trainer = DISDistillationTrainer(
        load(folders["tied" if is_tied else "untied"], dtype=dtype, **sizes),
        args=DISConfig(**settings),
        train_dataset=data,
        eval_dataset=data[:13],  # not a multiple of anything
        callbacks=[keeps],
        **given,
    )
    keeps.trainer = trainer
    if one_sample:
        split_alike(trainer.distiller.sampler)
    trainer.train()
    assert trainer.distiller.row_sparse == (mode == "row-sparse")
    steps = torch.zeros(())
    if mode == "row-sparse":  # of each row; FSDP2 has the rows sharded after a backward
        steps = trainer.optimizer.state[trainer.head.module.weight]["step"]
    output = trainer.predict(data[:13])
    if saves:
        trainer.save_model(folder / "saved")
    return {
        "student": whole(dict(trainer.model.named_parameters())),
        "gradients": [whole(one) for one in keeps.gradients],
        "evaluated": [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log],
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "metrics": {name: value for name, value in output.metrics.items() if name.endswith(("loss", "kl"))},
        "predictions": output.predictions,
        "saved": dict(load(folder / "saved", False, dtype).named_parameters()) if saves else {},
        **whole({"steps": steps}),
        "proposal": trainer.distiller.sampler.state_dict(),
        "items": int(trainer.num_items_seen),
    }


def run(folder: Path) -> None:
    # accelerate runs tensor parallelism on accelerators alone, and needs nothing of them.
    ParallelismConfig._validate_accelerator = lambda *_: None
    PartialState(cpu=True)
    folders = saved(folder)
    teacher = load(folders["teacher"])  # in two processes the cache is written by a tensor-parallel teacher
    cache_teacher_targets(teacher, examples(), folder / "cache", depth=8, sample_size=6, show_progress=False)
    results = {"world_size": processes()}
    for case in cases():
        results[case] = train(folders, folder, case)
        end_groups()
    case, single = (True, "spread", "forward_kl", "warm-up"), {"dtype": torch.float32}
    results["bf16"] = train(folders, folder, case, bf16=True, **single)
    results["float32"] = {one: train(folders, folder, one, **single) for one in float32_cases()}
    best = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    case = (True, "whole", "forward_kl", "sampled")
    results["best"] = train(folders, folder, case, learning_rate=0.5, lr_scheduler_type="constant", **best)
    torch.save(results, folder / f"rank_{int(os.environ.get('RANK', 0))}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
