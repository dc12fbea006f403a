"""TRL as a host: supervised fine-tuning on chats becomes distillation by sampled classes.

Needs ``pip install "hf_dis[trl]"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_dis.arguments import DISArguments
from hf_dis.distiller import Distiller
from hf_dis.distributed.sums import sum_over_processes
from hf_dis.integrations import require
from hf_dis.integrations.sft_checks import check_chat_template, check_config, check_text_only, check_trainer
from hf_dis.integrations.trl_host import TRLHost
from hf_dis.loss.objective import Losses
from hf_dis.models.tasks import base_model
from hf_dis.steps import Step
from hf_dis.trainer.mixin import DISTrainerMixin

require("trl", "1.16")

from trl import SFTConfig, SFTTrainer, is_conversational, maybe_convert_to_chatml  # noqa: E402  after the check

logger = logging.get_logger(__name__)


@dataclass
class DISSFTConfig(DISArguments, SFTConfig):
    """Arguments of :class:`DISSFTTrainer`: :class:`hf_dis.DISArguments` and ``trl.SFTConfig``.

    Defaults are those of the two: note that SFTConfig turns on ``bf16`` and ``gradient_checkpointing``.

    Raises:
        TypeError, ValueError: as those two, and ValueError if ``loss_type`` is not ``"nll"``.
    """

    def __post_init__(self) -> None:
        SFTConfig.__post_init__(self)
        DISArguments.__post_init__(self)
        check_config(self)


class DISSFTTrainer(TRLHost, SFTTrainer):
    """Distils a teacher into a student on what ``trl.SFTTrainer`` prepares.

    The data may be conversations, prompts with completions, or text. It may be packed or padding-free, with the loss
    on all tokens or on the answers alone. The student may get a PEFT adapter by ``peft_config``, but not on its output
    head. The teacher computes logits of the same tokens as the student.

    Arguments, attributes and errors are those of :class:`hf_dis.DISTrainerMixin`; ``args`` is a
    :class:`DISSFTConfig`, and ``**kwargs`` are as for ``SFTTrainer``. Of SFT's logs ``num_tokens`` and ``aux_loss``
    are kept. ``entropy_estimate``, computed from the sampled classes, stands for ``entropy``. There is no
    ``mean_token_accuracy``, which needs all classes.

    Args:
        model: the student, or its name or path.
        **kwargs: as for the mixin and ``SFTTrainer``.

    Raises:
        ValueError: as the mixin; if the student is a vision-language model; if teacher and student have different
            chat templates.
    """

    config_class = DISSFTConfig
    _name = f"{DISTrainerMixin._name} {SFTTrainer._name}"
    _tag_names = (*DISTrainerMixin._tag_names, *SFTTrainer._tag_names)

    def __init__(self, model: str | nn.Module, *args: Any, **kwargs: Any):
        check_text_only(kwargs.get("processing_class"))
        self._conversation = _first_conversation(kwargs.get("train_dataset"))
        own_forward = vars(base_model(model)).get("forward") if isinstance(model, nn.Module) else None
        try:
            super().__init__(model, *args, **kwargs)
        finally:
            _remove_fused_head(getattr(self, "model", model), own_forward)
        logger.warning_once(
            "mean_token_accuracy is not logged, since it needs all classes; entropy_estimate is logged in place of "
            "entropy where classes are sampled"
        )

    def _make_distiller(self) -> Distiller:
        check_trainer(self)
        check_chat_template(self.processing_class, self._teacher[1], self._conversation)
        return super()._make_distiller()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._num_tokens = torch.zeros((), dtype=torch.long, device=self.args.device)
        return super()._prepare_for_training(*args, **kwargs)

    def _record(self, step: Step, losses: Tensor, terms: Losses) -> None:
        super()._record(step, losses, terms)
        if self._in_training_step:
            mask = step.inputs.get("attention_mask")  # none where batches are padding-free
            self._num_tokens += step.inputs["input_ids"].numel() if mask is None else mask.sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the mixin's, with ``num_tokens``, those that the student was given on all processes."""
        if "loss" in logs and self.model.training:
            summed = sum_over_processes({"num_tokens": self._num_tokens})
            logs = {**logs, "num_tokens": int(summed["num_tokens"]) // self._tp_size}
        super().log(logs, start_time)


def _first_conversation(dataset: Any) -> Mapping[str, Any] | None:
    """The first example of a dataset if it is a conversation, as SFTTrainer prepares it."""
    if dataset is None:
        return None
    example = maybe_convert_to_chatml(dict(next(iter(dataset))))
    return example if is_conversational(example) else None


def _remove_fused_head(model: nn.Module | str, own_forward: Any) -> None:
    """Gives the student the forward back that it had before SFTTrainer put its own loss there.

    A copy of the student would otherwise run the forward of the original.

    Args:
        model: the student, in a PEFT model or not; a name where it was not loaded.
        own_forward: that of the instance, which accelerate puts there; None: that of the class.
    """
    if isinstance(model, str):
        return
    base = base_model(model)
    if own_forward is not None:
        base.forward = own_forward
    elif not hasattr(base, "_hf_hook"):  # a student that TRL spread over devices needs accelerate's below it
        vars(base).pop("forward", None)
