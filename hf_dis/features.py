"""The student as an embedding model: what its output head is given, for the rows of a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from .heads import SampledHead, head_features


class FeaturesMixin(Trainer):
    """What a distilling trainer offers besides logits."""

    head: SampledHead
    head_layers: tuple[str, ...]

    def extract_features(self, dataset: Any) -> Tensor:
        """What the student's output head is given for each row: nothing after it is computed, the head neither.

        In batches of ``per_device_eval_batch_size``, in evaluation mode and in the precision of training. With
        several processes each takes its share of the batches; all have to call this.

        Args:
            dataset: rows as for ``evaluate``; labels are not looked at.

        Returns:
            ``[n, d]`` in the order of ``dataset``, on CPU and on every process, float32 or wider.

        Raises:
            ValueError: if there is no output head that is one layer, or it is not given one vector a row.
        """
        if not self.head_layers:
            raise ValueError("the output head was not found: name it with head_name")
        features = []
        for inputs in self.get_test_dataloader(dataset):
            inputs = self._prepare_inputs(inputs)
            inputs = {name: value for name, value in inputs.items() if name not in self.label_names}
            with self.accelerator.autocast():
                batch = head_features(self.model, self.head.module, inputs)
            if batch.dim() != 2:
                raise ValueError(
                    f"the head of {type(self.model).__name__} is given features of shape {tuple(batch.shape)}: "
                    "extract_features takes models with one vector a row, [n, d]"
                )
            features.append(self.accelerator.gather_for_metrics(batch).cpu())
        return torch.cat(features).to(torch.promote_types(features[0].dtype, torch.float32))
