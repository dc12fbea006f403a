"""The teacher that runs beside the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash


def placed(teacher: nn.Module, device: torch.device) -> nn.Module:
    """The teacher on the training device, unless it was quantised or spread over devices when it was loaded; without
    the keys and values that a language model keeps for generation."""
    if hasattr(teacher, "config") and hasattr(teacher.config, "use_cache"):
        teacher.config.use_cache = False
    stays = getattr(teacher, "is_quantized", False) or getattr(teacher, "hf_device_map", None)
    return teacher if stays else teacher.to(device)


def check_separate(student: nn.Module, teacher: nn.Module) -> None:
    """Checks that no parameter of the student is also one of the teacher, which is frozen.

    Raises:
        ValueError: names the parameters that are shared.
    """
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in theirs]
    if shared:
        listed = ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
        raise ValueError(
            f"teacher and student share {len(shared)} parameters ({listed}), which the frozen teacher would keep from "
            "being trained: give the teacher modules of its own, by copy.deepcopy or by loading it anew"
        )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or None if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _not_in_pieces() -> Iterator[None]:
    """Under ZeRO-3 ``from_pretrained`` keeps a piece of each weight on each process, and only a DeepSpeed engine of
    the model's own puts them together: the teacher is loaded whole on each instead."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None and config() is not None:
            deepspeed.set_hf_deepspeed_config(config())


def load_teacher(name_or_path: str) -> PreTrainedModel:
    """Loads a teacher as the class that its checkpoint names, whole on each process.

    Args:
        name_or_path: of a transformers checkpoint.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if the checkpoint does not name a class of transformers.
    """
    try:
        architectures = AutoConfig.from_pretrained(name_or_path).architectures or ["none"]
    except (OSError, ValueError) as error:
        raise OSError(
            f"the teacher {name_or_path!r} cannot be loaded: {error}. It has to be a folder with a checkpoint of "
            "transformers (its config.json), or the name of one on the Hub that is within reach"
        ) from error
    teacher_class = getattr(transformers, architectures[0], None)
    if teacher_class is None:
        raise ValueError(
            f"the checkpoint {name_or_path} names the architecture {architectures[0]}, which transformers does not "
            "have: load the teacher yourself and pass the model"
        )
    with _not_in_pieces():
        teacher = teacher_class.from_pretrained(name_or_path)
    # For the model card: from_pretrained itself does not keep the commit.
    teacher.config._commit_hash = extract_commit_hash(cached_file(name_or_path, CONFIG_NAME), None)
    return teacher
