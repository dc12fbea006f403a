"""TRL's experimental ``GKDTrainer`` as a host: a mixture of given answers and answers that the student writes.

Needs ``pip install "hf_dis[trl]"``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hf_dis.distiller import Distiller
from hf_dis.integrations import require
from hf_dis.integrations.on_policy_arguments import OnPolicyArguments
from hf_dis.integrations.sft_checks import check_config
from hf_dis.items import IGNORED
from hf_dis.teacher.loading import open_teacher
from hf_dis.trainer.mixin import DISTrainerMixin
from hf_dis.trainer.positions import POSITIONS

require("trl", "1.16")

from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402  after the check
from trl.models.utils import unwrap_model_for_generation  # noqa: E402

from hf_dis.integrations import on_policy_checks as checks  # noqa: E402  imports trl
from hf_dis.integrations.trl import DISSFTTrainer  # noqa: E402

# What a step needs of a batch of GKD's collator.
COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass
class DISGKDConfig(OnPolicyArguments, GKDConfig):
    """Arguments of :class:`DISGKDTrainer`: those of the method, and ``trl.experimental.gkd.GKDConfig``.

    Defaults are TRL's: the student answers half of the batches, at temperature 0.9, and the loss is the Jensen-Shannon
    divergence with β = 0.5 at temperature 1. ``temperature`` steers generation alone; ``kd_temperature`` is that of
    the loss. ``beta`` and ``divergence`` choose the same thing: give one of them.

    Raises:
        TypeError, ValueError: as :class:`hf_dis.DISArguments` and ``GKDConfig``; ValueError if ``beta`` and
            ``divergence`` disagree, if ``hard_label_weight`` is not 0 while ``lmbda`` is above 0, or if a setting of
            SFT would have no effect.
    """

    temperature: float = field(
        default=0.9, metadata={"help": "Divides the logits where text is written, not in the loss; above 0."}
    )
    kd_temperature: float | None = field(
        default=1.0,
        metadata={"help": "Divides the logits of teacher and student in the loss; if not given temperature."},
    )

    def __post_init__(self) -> None:
        self._choose_divergence()  # TRL compares beta with numbers
        GKDConfig.__post_init__(self)
        OnPolicyArguments.__post_init__(self)
        check_config(self)
        checks.check_gkd_config(self)

    @staticmethod
    def _default_beta() -> float:
        """TRL's default: the Jensen-Shannon divergence."""
        return 0.5

    def _check_hard_labels(self) -> None:
        if self.lmbda > 0:
            super()._check_hard_labels()


class _Host(GKDTrainer):
    """``GKDTrainer`` with a teacher that is loaded, and with a step that writes no answer."""

    _loaded_teacher: nn.Module | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, teacher_model=self._loaded_teacher, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super(GKDTrainer, self).training_step(*args, **kwargs)


class DISGKDTrainer(DISSFTTrainer, _Host):
    """Distils a teacher into a student on a mixture of given answers and answers of the student.

    With the probability ``lmbda`` the student answers the prompts of a batch; otherwise the answers are those of the
    data, or the teacher's with ``seq_kd``. Data and generation are those of ``trl.experimental.gkd.GKDTrainer``. The
    answers of a whole accumulation window are written first, and then counted: the loss is divided by the tokens that
    are distilled. ``GKDTrainer`` itself divides by the number of the data's labels.

    Arguments, attributes, logs and errors are those of :class:`hf_dis.integrations.trl.DISSFTTrainer`; ``args`` is a
    :class:`DISGKDConfig`, and ``**kwargs`` are as for ``GKDTrainer``. Evaluation is on the given answers.

    Args:
        model: the student, or its name or path.
        teacher_model: a model, or the name or path of a checkpoint; None: ``args.teacher_model_name_or_path``.
        args: the configuration.
        **kwargs: as for the mixin and ``GKDTrainer``.

    Raises:
        ValueError: as ``DISSFTTrainer``; if a cache is given; if the data holds no conversations; if there is no
            tokenizer, or no chat template; if FSDP shards the teacher.
    """

    config_class = DISGKDConfig
    _name = f"{DISTrainerMixin._name} {GKDTrainer._name}"
    _tag_names = (*DISTrainerMixin._tag_names, *GKDTrainer._tag_names)

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: nn.Module | str | None = None,
        args: DISGKDConfig | None = None,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ):
        args = DISGKDConfig(output_dir="tmp_trainer") if args is None else args
        checks.check_teacher(args, teacher_model, kwargs)
        checks.check_gkd_data(kwargs)
        named = args.teacher_model_name_or_path if isinstance(args, DISGKDConfig) else None
        self._loaded_teacher, tokenizer = open_teacher(teacher_model or named, teacher_processing_class)
        checks.check_gkd_teacher(self._loaded_teacher)
        self._window: list[dict[str, Tensor]] = []
        self._window_items: Tensor | None = None
        super().__init__(model, self._loaded_teacher, args, tokenizer, **kwargs)

    def _make_distiller(self) -> Distiller:
        if self._conversation is not None:
            checks.check_prompts(self._conversation["messages"][:-1], self.processing_class, None)
        return super()._make_distiller()

    def _expected_items(self) -> int | None:
        return self.args.per_device_train_batch_size * self.args.max_new_tokens

    # The window

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """The batches of the next window, which the first training step of the window answers and counts."""
        # A resumed run restores its random numbers after this call.
        self._window = list(islice(epoch_iterator, num_batches))
        return self._window, None

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any) -> Tensor:
        """As the host's, after the answers of the window are written and counted."""
        if self._window:
            for batch in self._window:
                self._answer(model, batch)
            self._window_items = self._get_num_items_in_batch(self._window, self.args.device)
            self._window = []
        return super().training_step(model, inputs, self._window_items)

    def _answer(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        """Replaces the answers of a batch by those of the student or the teacher, or keeps them."""
        is_own = random.random() < self.lmbda
        if not (is_own or self.seq_kd):
            return
        checkpointing = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs} if is_own else {}
        with unwrap_model_for_generation(
            model if is_own else self.teacher_model,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            **checkpointing,
        ) as writer:
            written = self.generate_on_policy_outputs(writer, batch, self.generation_config)
        batch.update(zip(COLUMNS, written, strict=True))
        batch.pop(POSITIONS, None)  # of the given answers
        self._warn_of_lengths(batch["labels"])

    def _warn_of_lengths(self, labels: Tensor) -> None:
        is_written, ends = labels != IGNORED, self.generation_config.eos_token_id
        longest, has_end = is_written.sum(1).max(), torch.zeros_like(labels, dtype=torch.bool)
        if ends is not None:
            has_end = torch.isin(labels, torch.tensor(ends, device=labels.device)) & is_written
        clipped = 1 - has_end.any(1).float().mean()
        checks.warn_of_lengths(float(longest), float(clipped), ("max_new_tokens", self.args.max_new_tokens))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """As the host's, without the columns that are for generation."""
        return super()._prepare_inputs({name: inputs[name] for name in COLUMNS})
