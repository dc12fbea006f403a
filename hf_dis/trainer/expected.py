"""The number of items that a training batch is expected to have, for the choice between exact and sampled."""

from __future__ import annotations

import datasets
from transformers import Trainer

from hf_dis.models.tasks import find_task

# Examples whose tokens are counted.
EXAMPLES = 16


def expected_items(trainer: Trainer) -> int | None:
    """Counts the items of a batch on one process: its examples, or its tokens by the mean of the first examples.

    The examples are read where that runs no code of the user's: in a list, or in a ``datasets.Dataset`` without a
    transform.

    Args:
        trainer: with a student and a training dataset.

    Returns:
        the number of items, or None where the number of tokens is not known.
    """
    batch_size, dataset = trainer.args.per_device_train_batch_size, trainer.train_dataset
    if not find_task(trainer.accelerator.unwrap_model(trainer.model)).has_token_items:
        return batch_size
    is_stored = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if not (is_stored or isinstance(dataset, (list, tuple))) or not len(dataset):
        return None
    examples = [dataset[number] for number in range(min(EXAMPLES, len(dataset)))]
    lengths = [len(tokens) for one in examples if (tokens := one.get("labels", one.get("input_ids"))) is not None]
    return batch_size * sum(lengths) // len(lengths) if lengths else None
