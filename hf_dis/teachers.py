"""The teacher that runs beside the student."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from .rows import Rows
from .streaming import LogitStream
from .targets import TeacherTargets, check_teacher_logits
from .tasks import base_model, find_task, num_outputs


class OnlineTeacher:
    """A teacher that runs beside the student and is ranked by chunks of rows.

    No ``[N, C]`` tensor outlives a chunk. Never trained, never saved, in evaluation mode throughout.

    Args:
        model: any model that returns ``.logits``, ``[B, C]`` or ``[B, S, C]``.
        num_classes: C, those that it shares with the student: the first of its own.
        temperature: τ > 0.
        depth: m, how many ranks to resolve.
        chunk_rows: rows a chunk; by default as many as keep a chunk's logits within 64 MiB.
        context: entered around each forward; ``accelerator.autocast`` for mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        temperature: float,
        depth: int,
        chunk_rows: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model = model.eval().requires_grad_(False)
        self.num_classes, self.temperature, self.depth = num_classes, temperature, depth
        self.num_outputs = _num_outputs(model) or num_classes
        self.stream = LogitStream(model, self.num_outputs, chunk_rows, context)

    def __call__(self, inputs: dict[str, Tensor], rows: Rows, check_finite: bool = True) -> Iterator[TeacherTargets]:
        """Yields the ranked targets of each chunk of rows, in order; see :meth:`logits`."""
        # map holds no chunk back, as a loop's variable would while the next one is computed.
        return map(self._rank, self.logits(inputs, rows, check_finite))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the teacher's weights, from at most 128 values of each: another teacher has another one."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            values = tensor.flatten()[:: max(1, tensor.numel() // 64)]
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values.to("cpu", torch.float64).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _rank(self, logits: Tensor) -> TeacherTargets:
        return TeacherTargets(logits, self.temperature, self.depth)

    def logits(self, inputs: dict[str, Tensor], rows: Rows, check_finite: bool = True) -> Iterator[Tensor]:
        """Yields the logits of each chunk of rows, ``[n, C]``.

        Args:
            inputs: of the model, without labels.
            rows: which to ask for.
            check_finite: look for NaN and Inf; on an accelerator this waits for the device.

        Raises:
            ValueError: if the logits do not have as many columns as said.
            FloatingPointError: if they hold NaN or Inf; names the rows.
        """
        first_row = 0
        for logits in self.stream(inputs, rows):
            check_teacher_logits(logits, self.num_outputs, first_row, check_finite)
            first_row += len(logits)
            yield logits[:, : self.num_classes]
            del logits


def _num_outputs(model: nn.Module) -> int | None:
    """How many classes a transformers model answers for; None for any other module."""
    return num_outputs(model, find_task(model)) if hasattr(base_model(model), "config") else None


def placed(teacher: nn.Module, device: torch.device) -> nn.Module:
    """The teacher on the training device, unless it was quantised or spread over devices when it was loaded; without
    the keys and values that a language model keeps for generation."""
    if hasattr(teacher, "config") and hasattr(teacher.config, "use_cache"):
        teacher.config.use_cache = False
    stays = getattr(teacher, "is_quantized", False) or getattr(teacher, "hf_device_map", None)
    return teacher if stays else teacher.to(device)


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
