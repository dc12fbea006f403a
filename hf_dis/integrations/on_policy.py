"""TRL's ``DistillationTrainer`` as a host: the student writes the text, and is distilled on it by sampled classes.

Needs ``pip install "hf_dis[trl]"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_dis.distiller import Distiller
from hf_dis.integrations import require
from hf_dis.integrations.on_policy_arguments import OnPolicyArguments
from hf_dis.integrations.sft_checks import check_text_only
from hf_dis.integrations.trl_host import TRLHost
from hf_dis.items import IGNORED
from hf_dis.trainer.mixin import DISTrainerMixin

require("trl", "1.16")

from trl import DistillationConfig, DistillationTrainer  # noqa: E402  after the check

from hf_dis.integrations import on_policy_checks as checks  # noqa: E402  imports trl


@dataclass
class DISOnPolicyConfig(OnPolicyArguments, DistillationConfig):
    """Arguments of :class:`DISOnPolicyTrainer`: those of the method, and ``trl.DistillationConfig``.

    Defaults are TRL's: the reverse KL at temperature 1, for sampling and for the loss, without the factor τ². Note
    that TRL turns on ``bf16`` and ``gradient_checkpointing``. ``beta`` and ``divergence`` choose the same thing: give
    one of them.

    Raises:
        TypeError, ValueError: as :class:`hf_dis.DISArguments` and ``DistillationConfig``; ValueError if ``beta`` and
            ``divergence`` disagree, or if ``hard_label_weight`` is not 0.
    """

    def __post_init__(self) -> None:
        self._choose_divergence()  # TRL compares beta with numbers
        DistillationConfig.__post_init__(self)
        OnPolicyArguments.__post_init__(self)


class DISOnPolicyTrainer(TRLHost, DistillationTrainer):
    """Distils a teacher into a student on the text that the student writes to prompts.

    Generation, its buffer, vLLM, chat templates, tools, logs and adapters are those of ``trl.DistillationTrainer``.
    Only the loss on the completions is this package's. The token that the student wrote is always among the sampled
    classes. The loss is divided as TRL divides it: by the tokens of the completions in the whole accumulation window,
    on all processes.

    Arguments, attributes and errors are those of :class:`hf_dis.DISTrainerMixin`; ``args`` is a
    :class:`DISOnPolicyConfig`, and ``**kwargs`` are as for ``DistillationTrainer``. TRL's logs are kept, but
    ``entropy_estimate``, computed from the sampled classes, stands for ``entropy``. ``ce_loss`` is the student's own
    negative log-likelihood of its text. Evaluation generates too.

    Args:
        model: the student, or its name or path.
        teacher_model: as for the mixin; None: ``args.teacher_model_name_or_path``.
        args: the configuration.
        **kwargs: as for the mixin and ``DistillationTrainer``.

    Raises:
        ValueError: as the mixin. Also if prompts need a chat template and have none, or if teacher and student have
            different chat templates. Also if a cache is given, or if the student reads more than text. In training:
            if a prompt or a completion has no token.
    """

    config_class = DISOnPolicyConfig
    _name = f"{DISTrainerMixin._name} {DistillationTrainer._name}"
    _tag_names = (*DISTrainerMixin._tag_names, *DistillationTrainer._tag_names)

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: nn.Module | str | None = None,
        args: DISOnPolicyConfig | None = None,
        **kwargs: Any,
    ):
        checks.check_teacher(args, teacher_model, kwargs)
        check_text_only(kwargs.get("processing_class"))
        if teacher_model is None and args is not None:
            teacher_model = args.teacher_model_name_or_path
        self._prompt = checks.first_prompt(kwargs.get("train_dataset"))
        self._window_items = torch.ones(())
        super().__init__(model, teacher_model, args, **kwargs)

    def _make_distiller(self) -> Distiller:
        check_text_only(self.processing_class)
        checks.check_prompts(self._prompt, self.processing_class, self._teacher[1], self.args.chat_template_kwargs)
        return super()._make_distiller()

    def _expected_items(self) -> int | None:
        longest = self.args.max_completion_length
        return None if longest is None else self.args.per_device_train_batch_size * longest

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        # Not the mixin's, which looks for items in the data: they are the tokens that the student will have written.
        return DistillationTrainer._get_dataloader(self, *args, **kwargs)

    # Generation

    def _generate_single_turn(
        self, prompt_ids: Sequence[Sequence[int]], *args: Any, **kwargs: Any
    ) -> list[Sequence[int]]:
        checks.check_prompt_tokens(prompt_ids)
        completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        checks.check_completions(completions)
        return completions

    def _generate(self, prompts: list) -> Any:
        made = super()._generate(prompts)
        found = self._metrics["train" if self.model.training else "eval"]
        longest, clipped = (found[f"completions/{name}"][-1] for name in ("max_length", "clipped_ratio"))
        checks.warn_of_lengths(longest, clipped, ("max_completion_length", self.max_completion_length))
        return made

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        made = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._window_items = made["num_items_in_batch"]
            self.num_items_seen += self._window_items
        return made

    def _prepare_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """The batch that the student writes, or has written: ``input_ids``, ``attention_mask`` and ``labels``."""
        return _labelled(super()._prepare_inputs(inputs))

    # Normalisation

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Returns None: the items exist once the student has written them."""

    def _normalise(self, losses: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Σ loss / completion tokens of the window on all processes, times the number of processes."""
        if not self.model.training:
            return super()._normalise(losses, num_items_in_batch)
        # TRL counts over all processes whatever average_tokens_across_devices says, and DDP averages the gradients.
        return losses.sum() / self._window_items.clamp_min(1) * self.accelerator.num_processes


def _labelled(written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prompts and completions as one batch, ``[B, P + L]`` each; its labels are the tokens that the student wrote."""
    completions, mask = written["completion_ids"], written["completion_mask"]
    is_own = mask if written.get("tool_mask") is None else mask * written["tool_mask"]
    prompts = written["prompt_ids"]
    own = completions.masked_fill(is_own == 0, IGNORED)
    return {
        "input_ids": torch.cat([prompts, completions], 1),
        "attention_mask": torch.cat([written["prompt_mask"], mask], 1),
        "labels": torch.cat([torch.full_like(prompts, IGNORED), own], 1),
    }
