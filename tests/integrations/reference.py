"""Exact distillation on the documents of SFT's batches, from the definition, in float64.

Each document goes through teacher and student on its own, so what packing must not change is not in the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]
Batch = dict[str, Tensor]


def documents(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and labels of each document of a batch: those between two starts, or the rows without padding."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        for start, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            yield ids[0, start:stop], labels[0, start:stop]
    else:
        for row, mask in enumerate(batch["attention_mask"].bool()):
            yield ids[row, mask], labels[row, mask]


def supervised(batch: Batch, *models: nn.Module) -> tuple[Tensor, ...]:
    """The labels of a batch's supervised tokens, and each model's logits that answer for them."""
    labels, logits = [], [[] for _ in models]
    for ids, wanted in documents(batch):
        counted = wanted[1:] != -100
        labels.append(wanted[1:][counted])
        for model, found in zip(models, logits, strict=True):
            found.append(model(input_ids=ids[None], use_cache=False).logits[0, :-1][counted])
    return torch.cat(labels), *(torch.cat(found) for found in logits)


def distillation(batches: list[Batch], student: nn.Module, teacher: nn.Module, settings, kd: Loss, ce: Loss) -> Tensor:
    """The mean over all supervised tokens of the batches of (1 - λ) τ² KL + λ CE; scalar, differentiable.

    Args:
        batches: one optimizer step, of all processes.
        student, teacher: float64.
        settings: with ``temperature`` and ``hard_label_weight``.
        kd, ce: per item, from the definition.
    """
    losses = []
    for batch in batches:
        labels, ours, theirs = supervised(batch, student, teacher)
        weight = settings.hard_label_weight
        distilled = kd(ours, theirs.detach(), settings.temperature)
        losses.append((1 - weight) * distilled + weight * ce(ours, labels))
    return torch.cat(losses).mean()
