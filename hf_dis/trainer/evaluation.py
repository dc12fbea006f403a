"""Evaluation: the losses of every item, averaged over the items of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import Tensor

from hf_dis.distributed.replicas import Replicas
from hf_dis.items import Items
from hf_dis.loss.objective import Losses
from hf_dis.precision import widest
from hf_dis.report.diagnostics import RunningMeans

Gather = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Evaluation:
    """Collects the losses of an evaluation.

    Args:
        holds_logits: compute the student's logits of a batch as a whole, not in chunks.
    """

    def __init__(self, holds_logits: bool):
        self.holds_logits = holds_logits
        self._means = RunningMeans()
        self._batch: tuple[Items, Tensor, Losses] | None = None

    def add(self, items: Items, losses: Tensor, terms: Losses) -> None:
        """Takes in the losses of a batch.

        Args:
            items: of the batch.
            losses: per item, ``[N]``.
            terms: of the losses, per item, ``[N]`` each.
        """
        self._batch = items, losses.detach(), terms

    def close_batch(self, loss: Tensor, gather: Gather) -> None:
        """Adds the losses that :meth:`add` took in to the means.

        An override of ``compute_loss`` may have added to the loss of the batch: the difference to the mean over the
        items is added to the loss of each item. An override that does not call ``super().compute_loss`` gives no
        losses of items, so nothing is added.

        Args:
            loss: of the batch as ``compute_loss`` returned it, a scalar.
            gather: gathers sums per example over processes, without the examples that only fill up the last batch.
        """
        if self._batch is None:
            return
        (items, losses, terms), self._batch = self._batch, None
        added = loss - losses.sum() / max(1, len(losses))
        values = {**terms, "loss": losses + added}
        dtype = widest(losses.device)
        sums = {name: items.sums_by_example(value.to(dtype)) for name, value in values.items()}
        sums["items"] = items.sums_by_example(torch.ones_like(losses, dtype=dtype))
        sums = gather(sums)
        self._means.add(sums, counts=sums.pop("items"))

    def means(self) -> dict[str, float]:
        """The means over all items: ``loss``, and each term under its name."""
        return self._means.pop()


def gather_examples(accelerator: Accelerator, replicas: Replicas | None, values: Any) -> Any:
    """Gathers values per example over processes, without the examples that only fill up the last batch.

    Args:
        accelerator: of the run; in an evaluation.
        replicas: the copies of a tensor-parallel student, or None. The processes of a copy have the same examples,
            which count once.
        values: tensors ``[n, ...]``, in lists, tuples or dicts.
    """
    if replicas is None:
        return accelerator.gather_for_metrics(values)
    state = accelerator.gradient_state
    cut = state.remainder if state.end_of_dataloader and state.remainder > 0 else None
    return recursively_apply(lambda tensor: replicas.gather(tensor)[:cut], values)
