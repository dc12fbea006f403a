"""Scores of next-item recommendation: NDCG and recall over the whole catalogue, one true item per user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
import torch
from torch import Tensor

from hf_dis.metrics.accuracy import TopKAccuracy, check_ranked, top_k_accuracy

# Scores that exist at a time: 16 MiB in float32, of at most so many classes.
TILE_ELEMENTS, TILE_CLASSES = 2**22, 2**16


@torch.no_grad()
def top_ranked(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, k: int = 10, first_class: int = 0
) -> Tensor:
    """Ranks the classes of an output layer for each vector, tile by tile; never holds ``[n, C]``.

    Equal scores are in no particular order.

    Args:
        features: the layer's input, ``[n, d]``.
        weight, bias: of the layer, ``[C, d]`` and ``[C]`` or None.
        k: classes to return, from 1 to ``C - first_class``.
        first_class: classes below it are not ranked; 1 leaves out the class of padding.

    Returns:
        class ids by falling score, ``[n, k]``.

    Raises:
        ValueError: if ``k`` is outside its range, or a ranked score is NaN or Inf.
    """
    num_classes = len(weight) - first_class
    if not 1 <= k <= num_classes:
        raise ValueError(f"k is {k}: it has to be from 1 to {num_classes}, the number of classes to rank")
    tile = min(num_classes, TILE_CLASSES)
    parts = [
        _top_of_chunk(chunk, weight, bias, k, first_class, tile)
        for chunk in features.split(max(1, TILE_ELEMENTS // tile))
    ]
    return torch.cat(parts) if parts else torch.empty(0, k, dtype=torch.long, device=features.device)


def _top_of_chunk(
    features: Tensor, weight: Tensor, bias: Tensor | None, k: int, first_class: int, tile: int
) -> Tensor:
    scores = features.new_empty(len(features), 0)
    ids = torch.empty(len(features), 0, dtype=torch.long, device=features.device)
    for start in range(first_class, len(weight), tile):
        found = features @ weight[start : start + tile].T
        if bias is not None:
            found += bias[start : start + tile]
        values, places = found.topk(min(k, found.shape[1]), dim=1)
        scores, order = torch.cat([scores, values], 1).sort(dim=1, descending=True)
        ids = torch.cat([ids, places + start], 1).gather(1, order)[:, :k]
        scores = scores[:, :k]
    bad = ~scores.isfinite().all(1)
    if bad.any():
        raise ValueError(
            f"the scores of {int(bad.sum())} of {len(bad)} vectors hold NaN or Inf: such a ranking means nothing; "
            "check the model, or lower its learning rate"
        )
    return ids


def next_item_scores(ranked: Any, references: Any, k: Sequence[int] = (10,)) -> dict[str, float]:
    """NDCG and recall at k, with one true item per user.

    The ideal ranking has the true item first, so the NDCG of a user is ``1 / log2(1 + rank)`` where the rank, from 1
    on, is at most k, and 0 elsewhere. Recall at k is then the share of users whose true item is among the first k.

    Args:
        ranked: item ids by falling score, integers ``[n, m]`` with m at least ``max(k)``, from the whole catalogue.
        references: the true next item of each user, integers ``[n]``.
        k: item counts, each of which gives two results.

    Returns:
        ``{"ndcg10": ..., "recall10": ...}``, named after ``k``, each in [0, 1], means over users.

    Raises:
        ValueError: if shapes or types differ, a reference is negative, or a ``k`` is below 1 or above m.
    """
    ranked, references = check_ranked(ranked, references)
    recall = top_k_accuracy(ranked, references, k)
    hits = ranked == references[:, None]
    gains = np.where(hits.any(axis=1), 1 / np.log2(2 + hits.argmax(axis=1)), 0.0)
    scores = {}
    for depth in k:
        scores[f"ndcg{depth}"] = float(np.where(hits[:, :depth].any(axis=1), gains, 0.0).mean())
        scores[f"recall{depth}"] = recall[f"top{depth}"]
    return scores


class NextItem(TopKAccuracy):
    """NDCG and recall as an ``evaluate`` metric that works offline; construct it without ``evaluate.load``.

    The metric takes ranked item ids, because the scores of a whole catalogue do not fit into memory for all users.
    :func:`top_ranked` makes the ranking of each batch from the input of the output layer. For a layer whose rows are
    spread over processes :meth:`hf_dis.ShardedHead.top_k` makes the ranking:

        metric = NextItem()
        for features, items in batches:  # of the users' last positions
            metric.add_batch(predictions=top_ranked(features, model.lm_head.weight), references=items)
        metric.compute(k=(10,))

    ``compute(predictions=..., references=..., k=(10,))`` has the arguments and results of :func:`next_item_scores`.
    """

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        info.description = "NDCG and recall of the true next item among the best-ranked items of a whole catalogue."
        info.inputs_description = "predictions: ranked item ids [n, m]; references: item ids [n]; k: item counts."
        return info

    def _compute(self, predictions: Any, references: Any, k: Sequence[int] = (10,)) -> dict[str, float]:
        return next_item_scores(predictions, references, k)
