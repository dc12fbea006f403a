"""The places of a batch's items, found on the host before the batch goes to an accelerator.

There a step would have to wait for their number, which decides the shapes of all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainingArguments

from hf_dis.models.tasks import Task, find_items
from hf_dis.teacher.cached import TARGETS

# The column of a batch that holds the places of its items among its tokens, [N].
POSITIONS = "item_positions"


def with_positions(
    collate: Callable[[Any], Any], task: Task, dataset: Dataset, args: TrainingArguments
) -> Callable[[Any], Any]:
    """Wraps a data collator in :class:`PositionsCollator` where a step would have to wait for an accelerator.

    Where one process collates the batches of all processes, the collator stays as it is: accelerate then cuts each
    column by examples.

    Args:
        collate: makes the batch, with its stored targets if there is a cache.
        task: of the student; where an item is an example, any column tells the number of items.
        dataset: of the training.
        args: of the training.
    """
    cuts_columns = args.accelerator_config.dispatch_batches or isinstance(dataset, IterableDataset)
    if not task.has_token_items or args.device.type == "cpu" or cuts_columns:
        return collate
    return PositionsCollator(collate, task)


@dataclass
class PositionsCollator:
    """Collates, then adds the places of the batch's items; works within dataloader workers.

    A batch without labels stays as it is.

    Args:
        collate: makes the batch, with its stored targets if there is a cache.
        task: of the student.

    Raises:
        ValueError, DataError: as :func:`hf_dis.items.token_items`.
    """

    collate: Callable[[Any], Mapping[str, Any]]
    task: Task

    def __call__(self, features: Any) -> Mapping[str, Any]:
        """Collates examples, and adds the places of their items."""
        batch = self.collate(features)
        if isinstance(batch.get("labels"), Tensor):
            items = find_items(self.task, batch, batch["labels"], batch.get(TARGETS))
            batch[POSITIONS] = items.positions
        return batch


class _Known(NamedTuple):
    labels: Tensor
    version: int
    positions: Tensor


class KnownPositions:
    """The places of the items of some batches, each known as long as the batch has the labels that it came with.

    Args:
        batches: with the column of :class:`PositionsCollator` or not; the column is taken out.
    """

    def __init__(self, batches: Sequence[MutableMapping[str, Any]] = ()):
        self._known = []
        for batch in batches:
            positions = batch.pop(POSITIONS, None)
            if positions is not None:
                self._known.append(_Known(batch["labels"], batch["labels"]._version, positions))

    def of(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The places of a batch's items, ``[N]``; None where they are not known.

        An override of the host may have replaced or changed the labels meanwhile.
        """
        labels = batch.get("labels")
        for known in self._known:
            if known.labels is labels and known.version == labels._version:
                return known.positions
        return None
