"""Evaluation: the losses of every item, averaged over the items of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_dis.items import Items
from hf_dis.loss.exact import Losses
from hf_dis.report.diagnostics import RunningMeans

if TYPE_CHECKING:
    from hf_dis.trainer.mixin import DISTrainerMixin

Gather = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Evaluation:
    """Collects the losses of an evaluation.

    Args:
        holds_logits: the student's logits are wanted as a whole.
    """

    def __init__(self, holds_logits: bool):
        self.holds_logits = holds_logits
        self._means = RunningMeans()
        self._batch: tuple[Items, Tensor, Losses] | None = None

    def add(self, items: Items, losses: Tensor, terms: Losses) -> None:
        """Takes in a batch.

        Args:
            items: of the batch.
            losses: per item, ``[N]``.
            terms: per item, ``[N]`` each.
        """
        self._batch = items, losses.detach(), terms

    def close_batch(self, loss: Tensor, gather: Gather) -> None:
        """Adds the batch that was taken in to the means.

        Args:
            loss: of the batch as ``compute_loss`` returned it. By how much it differs from the mean over the items, an
                override of ``compute_loss`` has added to it, and so it is added to the loss of each item.
            gather: gathers sums by example over processes, without the examples that fill up the last batch.
        """
        items, losses, terms = self._batch
        added = loss.detach() - losses.sum() / max(1, len(losses))
        values = {**terms, "loss": losses + added}
        sums = {name: items.sums_by_example(value.double()) for name, value in values.items()}
        sums["items"] = items.sums_by_example(torch.ones_like(losses, dtype=torch.double))
        sums = gather(sums)
        self._means.add(sums, counts=sums.pop("items"))
        self._batch = None

    def means(self) -> dict[str, float]:
        """The means over all items."""
        return self._means.pop()


class NoItemsCheck(TrainerCallback):
    """Ends a training that has nothing to learn from."""

    def __init__(self, trainer: DISTrainerMixin):
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError if no item of the epoch was supervised."""
        if not self.trainer.num_items_seen:
            raise ValueError(
                "no token of the training data is supervised: all labels are -100 (that of the first token does not "
                "count in a causal language model); look at the data collator and at what masks the labels"
            )
