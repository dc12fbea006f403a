"""Checkpoints: the sampler's state, process by process, and weights under the names that the model gives them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

if TYPE_CHECKING:
    from .sampler import ClassSampler

logger = logging.get_logger(__name__)

STATE_FILE = "dis_state_{rank}.safetensors"


class CheckpointMixin(Trainer):
    """What a distilling trainer saves and restores besides what ``Trainer`` does."""

    sampler: ClassSampler

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)
        path = os.path.join(output_dir, STATE_FILE.format(rank=self.args.process_index))
        save_file({name: value.contiguous() for name, value in self.sampler.state_dict().items()}, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE.format(rank=self.args.process_index))
        if os.path.isfile(path):
            self.sampler.load_state_dict(load_file(path))
        else:
            logger.warning(
                f"{path} is missing: the proposal and its random draws start anew, so this run will not repeat the "
                "interrupted one. It was saved by another trainer, or by more processes."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if self._saves_plain_weights(model):
            _load_as_from_pretrained(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._saves_plain_weights(self.model):
            _load_as_from_pretrained(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _saves_plain_weights(self, model: nn.Module) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return isinstance(model, PreTrainedModel) and not sharded


def _load_as_from_pretrained(model: PreTrainedModel, checkpoint: str) -> None:
    """Loads a checkpoint's weights under the names that the model gives them.

    Trainer loads the file's names as they are, and where a model saves under other names than it has (ViT, Swin,
    Dinov2, ...) goes on with a random encoder and only a warning.
    """
    saved = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
