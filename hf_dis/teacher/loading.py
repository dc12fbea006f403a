"""Loading a teacher, placing it on a device, and checking that it is separate from the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from hf_dis.models.spread import is_offloaded_by_fsdp


def placed(teacher: nn.Module, device: torch.device) -> nn.Module:
    """Puts a teacher on a device, and turns off the cache of keys and values that is meant for generation.

    A teacher stays where it is if it was quantised, or if accelerate has offloaded it or spread it over devices.

    Args:
        teacher: changed in place.
        device: of the training.

    Returns:
        the teacher.

    Raises:
        ValueError: if FSDP2 shards the teacher and offloads it to the processor.
    """
    if hasattr(teacher, "config") and hasattr(teacher.config, "use_cache"):
        teacher.config.use_cache = False
    if is_offloaded_by_fsdp(teacher):
        raise ValueError(
            "FSDP has sharded the teacher and offloads it to the processor: leave the offload_policy out, which is "
            "fsdp_cpu_offload in a DistributedConfig, or load the teacher whole"
        )
    has_hooks = any("_hf_hook" in module.__dict__ for module in teacher.modules())
    stays = has_hooks or getattr(teacher, "is_quantized", False) or getattr(teacher, "hf_device_map", None)
    return teacher if stays else teacher.to(device)


def open_teacher(
    teacher: nn.Module | str | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[nn.Module | None, PreTrainedTokenizerBase | None]:
    """Returns a teacher and its tokenizer; loads them where the teacher is a name or a path.

    Args:
        teacher: a model, the name or path of a checkpoint, or None.
        tokenizer: takes the place of the checkpoint's own.
    """
    if isinstance(teacher, str):
        return load_teacher(teacher), tokenizer or load_tokenizer(teacher)
    return teacher, tokenizer


def check_separate(student: nn.Module, teacher: nn.Module) -> None:
    """Checks that student and teacher share no parameter: the teacher is frozen.

    Args:
        student, teacher: the models.

    Raises:
        ValueError: if they share parameters; names the first five.
    """
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in theirs]
    if shared:
        listed = ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
        raise ValueError(
            f"teacher and student share {len(shared)} parameters ({listed}): the teacher is frozen, so the student "
            "needs parameters of its own; make the teacher by copy.deepcopy, or load it separately"
        )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer beside a checkpoint; None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _not_in_pieces() -> Iterator[None]:
    """Loads models whole on each process within a context, also under ZeRO-3.

    There ``from_pretrained`` would leave a piece of each weight on each process, and only a DeepSpeed engine of the
    model's own puts the pieces together.
    """
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None and config() is not None:
            deepspeed.set_hf_deepspeed_config(config())


@contextmanager
def _explained(name_or_path: str) -> Iterator[None]:
    """Turns an error of loading into one that names the teacher and the remedy."""
    try:
        yield
    except (OSError, ValueError) as error:
        cause = str(error).strip().rstrip(".")
        raise OSError(
            f"the teacher {name_or_path!r} cannot be loaded: {cause}. It has to be a folder with a checkpoint of "
            "transformers (config.json and weights), or the name of a checkpoint on the Hub"
        ) from error


def load_teacher(name_or_path: str) -> PreTrainedModel:
    """Loads a teacher as the class that its checkpoint names, whole on each process.

    Args:
        name_or_path: of a transformers checkpoint.

    Raises:
        OSError: if there is no such checkpoint, or it has no weights.
        ValueError: if the checkpoint names no class of transformers.
    """
    with _explained(name_or_path):
        architectures = AutoConfig.from_pretrained(name_or_path).architectures or [""]
    teacher_class = getattr(transformers, architectures[0], None)
    if teacher_class is None:
        named = f"{architectures[0]}, which transformers does not have" if architectures[0] else "no class"
        raise ValueError(
            f"the config of {name_or_path} has under 'architectures' {named}: load the teacher yourself and pass the "
            "model"
        )
    with _explained(name_or_path), _not_in_pieces():
        teacher = teacher_class.from_pretrained(name_or_path)
    # The model card names the commit, which from_pretrained does not keep.
    teacher.config._commit_hash = extract_commit_hash(cached_file(name_or_path, CONFIG_NAME), None)
    return teacher
