"""Facts about a run that its report states: sizes, settings, the command, and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shlex
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState, TrainingArguments

from hf_dis.arguments import DISArguments
from hf_dis.models.provenance import class_name, known_as
from hf_dis.version import __version__

if TYPE_CHECKING:
    from hf_dis.distiller import Distiller

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "trl")
TRAINING = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "fp16",
    "seed",
)
# Arguments of a command whose values are not for a page that is passed on.
SECRET = re.compile(r"token|password|secret|api[-_]?key|credential", re.IGNORECASE)


def run_facts(distiller: Distiller, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """The facts of a training.

    Args:
        distiller: of the trainer.
        args: of the trainer.
        state: of the trainer.
    """
    teacher = None if distiller.online_teacher is None else distiller.online_teacher.model
    settings = {one.name: getattr(distiller.arguments, one.name) for one in fields(DISArguments)}
    return {
        "task": distiller.task.value,
        "num_classes": distiller.num_classes,
        "mode": distiller.mode,
        "student": type(distiller.student).__name__,
        "teacher": "stored targets" if teacher is None else known_as(teacher)[0] or class_name(teacher),
        "logits_per_item": distiller.num_classes if distiller.mode == "exact" else distiller.sampler.columns,
        "max_steps": state.max_steps,
        "method": settings,
        "training": {name: str(getattr(args, name)) for name in TRAINING},
        "command": command(sys.orig_argv),
        "versions": versions(),
        "device": device_name(args.device),
        "processes": args.world_size,
    }


def logits_per_item(distiller: Distiller, state: TrainerState) -> int:
    """Student logits that the last step computed per item: the sampled columns, or C where all are computed.

    Args:
        distiller: of the trainer.
        state: of the trainer, after the step.
    """
    warmup = distiller.arguments.get_exact_warmup_steps(state.max_steps)
    is_exact = distiller.mode == "exact" or state.global_step <= warmup > 0
    return distiller.num_classes if is_exact else distiller.sampler.columns


def command(argv: list[str]) -> str:
    """A command as a shell takes it, without the values of arguments such as ``--hub_token``."""
    shown, hides_next = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        is_secret = name.startswith("-") and SECRET.search(name) is not None
        if hides_next and not word.startswith("-"):
            shown.append("***")
        else:
            shown.append(f"{name}=***" if is_secret and equals else word)
        hides_next = is_secret and not equals
    return shlex.join(shown)


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the packages that a run depends on, by name."""
    found = {"hf_dis": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The name of a device: its own on CUDA, its type and the number of threads on a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{platform.machine()} processor, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    )
