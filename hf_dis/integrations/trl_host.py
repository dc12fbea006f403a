"""Hooks that all hosts of TRL share: their own batches, the student's entropy, and the model card."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_dis.distiller import Distiller
from hf_dis.head.tensor_parallel import is_tensor_parallel
from hf_dis.loss.entropy import sampled_entropy
from hf_dis.report.gradient_error import GradientError
from hf_dis.steps import SampledStep, Step, WarmupStep
from hf_dis.trainer.mixin import DISTrainerMixin


class TRLHost(DISTrainerMixin):
    """Trains one of TRL's trainers with the step of the method; put this mixin before TRL's class."""

    def _begin(self, inputs: dict[str, Any], returns_outputs: bool) -> Step:
        # With a cache of keys and values a model does not look for the documents of a packed sequence.
        return super()._begin({**inputs, "use_cache": False}, returns_outputs)

    def _make_distiller(self) -> Distiller:
        if is_tensor_parallel(self._student):
            raise ValueError(
                f"the student is tensor-parallel, and {type(self).__name__} counts and writes text for each process "
                "alone: use DISDistillationTrainer on tokenised text, or load the student whole"
            )
        return super()._make_distiller()

    def _quality(self, step: Step) -> dict[str, Tensor | GradientError]:
        quality = super()._quality(step)
        if isinstance(step, (SampledStep, WarmupStep)):
            # Up to a constant per item the logits, at temperature 1 as in TRL's entropy.
            logits = self.distiller.arguments.temperature * step.result.log_student
            quality["entropy_estimate"] = sampled_entropy(logits, step.sample.log_weights)
        return quality

    def create_model_card(self, *, dataset_name: str | None = None, **summary: Any) -> None:
        """As the mixin's; ``dataset_name``, as TRL's trainers take it, is ``dataset`` there."""
        super().create_model_card(**({} if dataset_name is None else {"dataset": dataset_name}), **summary)
