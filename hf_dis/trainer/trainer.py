"""DISDistillationTrainer: ``transformers.Trainer`` with the step of the method."""

from __future__ import annotations

from transformers import Trainer

from hf_dis.trainer.config import DISConfig
from hf_dis.trainer.mixin import DISTrainerMixin


class DISDistillationTrainer(DISTrainerMixin, Trainer):
    """Distils a teacher into a student by dynamic importance sampling (arXiv 1812.00914).

    Arguments, attributes and errors are those of :class:`hf_dis.DISTrainerMixin`; ``args`` is a
    :class:`hf_dis.DISConfig`, and ``**kwargs`` are as for ``transformers.Trainer``.
    """

    config_class = DISConfig
