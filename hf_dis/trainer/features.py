"""The student as an embedding model: the features that its output head is given, for all examples of a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_dis.models.head_features import head_features

if TYPE_CHECKING:
    from hf_dis.trainer.mixin import DISTrainerMixin


def extract_features(trainer: DISTrainerMixin, dataset: Any) -> Tensor:
    """The features that the student's output head is given for each example; nothing after them is computed.

    The student runs in evaluation mode, in the precision of training, on batches of ``per_device_eval_batch_size``.
    With several processes each takes its share of the batches, and every process has to call this function.

    Args:
        trainer: whose student is asked.
        dataset: examples as for ``evaluate``; labels are not read.

    Returns:
        ``[n, d]`` in the order of ``dataset``, on CPU and on every process, float32 or wider.

    Raises:
        ValueError: if no output head of one layer was found, or the head is not given one vector per example.
    """
    distiller = trainer.distiller
    if not distiller.head_layers:
        raise ValueError("the output head was not found: name it with head_name")
    features = []
    hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    for inputs in tqdm(trainer.get_test_dataloader(dataset), desc="Features", disable=hidden):
        inputs = trainer._prepare_inputs(inputs)
        dropped = {*trainer.label_names, *distiller.teacher_columns}
        inputs = {name: value for name, value in inputs.items() if name not in dropped}
        with trainer.accelerator.autocast():
            batch = head_features(trainer.model, distiller.head.module, inputs)
        if batch.dim() != 2:
            raise ValueError(
                f"the head of {type(trainer.model).__name__} is given features of shape {tuple(batch.shape)}: "
                "extract_features takes models with one vector per example, [n, d]"
            )
        features.append(trainer.gather_examples(batch).cpu())
    return torch.cat(features).to(torch.promote_types(features[0].dtype, torch.float32))
