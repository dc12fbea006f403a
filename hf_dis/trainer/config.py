"""DISConfig: the settings of the method on top of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from hf_dis.arguments import DISArguments


@dataclass
class DISConfig(DISArguments, TrainingArguments):
    """Arguments of :class:`hf_dis.DISDistillationTrainer`: :class:`hf_dis.DISArguments` and ``TrainingArguments``.

    Raises:
        TypeError, ValueError: as those two.
    """

    def __post_init__(self) -> None:
        TrainingArguments.__post_init__(self)
        DISArguments.__post_init__(self)
