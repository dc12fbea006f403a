"""Top-k accuracy from ranked class ids, without a score for every class of every item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


def top_k_accuracy(ranked: Any, references: Any, k: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The share of items whose true class is among the first k, for each k.

    Args:
        ranked: class ids by falling score, integers ``[n, m]`` with m at least ``max(k)``.
        references: true class ids, integers ``[n]``.
        k: class counts, each of which gives one result.

    Returns:
        ``{"top1": ..., "top5": ...}``, named after ``k``, each in [0, 1].

    Raises:
        ValueError: if shapes or types differ from these, a reference is negative, or a ``k`` is below 1 or above m.
    """
    ranked, references = check_ranked(ranked, references)
    if isinstance(k, int) or len(k) == 0 or min(k) < 1:
        raise ValueError(f"k is {k!r}: it has to be a sequence of positive integers, such as (1, 5).")
    if max(k) > ranked.shape[1]:
        raise ValueError(
            f"top-{max(k)} accuracy needs {max(k)} ranked classes per item, and predictions have {ranked.shape[1]}: "
            f"take logits.topk({max(k)}).indices, or pass a smaller k."
        )
    hits = ranked == references[:, None]
    return {f"top{depth}": float(hits[:, :depth].any(axis=1).mean()) for depth in k}


def check_ranked(ranked: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checks ranked class ids and true classes, and returns them as arrays ``[n, m]`` and ``[n]``.

    Args:
        ranked, references: as for :func:`top_k_accuracy`.

    Raises:
        ValueError: if shapes or types differ, there are none, or a reference is negative.
    """
    try:
        ranked, references = np.asarray(ranked), np.asarray(references)
    except ValueError as error:
        raise ValueError(
            "predictions have different numbers of ranked classes: every item needs the same number."
        ) from error
    if ranked.ndim != 2 or ranked.dtype.kind not in "iu":
        raise ValueError(
            f"predictions are {ranked.dtype} {list(ranked.shape)}: they have to be ranked class ids, integers [n, m] "
            "by falling score; take logits.topk(5).indices."
        )
    if references.shape != ranked.shape[:1] or references.dtype.kind not in "iu":
        raise ValueError(
            f"references are {references.dtype} {list(references.shape)}: they have to be {len(ranked)} class ids, "
            "one for each item of the predictions."
        )
    if len(references) == 0:
        raise ValueError("there are no predictions to score: add batches with items that have labels.")
    if references.min() < 0:
        raise ValueError(f"references hold {references.min()}: leave out ignored positions (-100) first.")
    return ranked, references


class TopKAccuracy(evaluate.Metric):
    """Top-k accuracy as an ``evaluate`` metric that works offline; construct it without ``evaluate.load``.

    The metric takes ranked class ids, because with a huge output layer the scores of all evaluated items do not fit
    into memory. Let the Trainer keep only the first few classes of each batch:

        metric = TopKAccuracy()
        trainer = Trainer(
            ...,
            preprocess_logits_for_metrics=lambda logits, labels: logits.topk(5).indices,
            compute_metrics=lambda p: metric.compute(predictions=p.predictions, references=p.label_ids),
        )

    ``compute(predictions=..., references=..., k=(1, 5))`` has the arguments and results of :func:`top_k_accuracy`.
    """

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any) -> None:
        # On disk, processes that score the same items would queue for one cache file.
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of items whose true class is among the k best-ranked ones.",
            citation="",
            inputs_description="predictions: ranked class ids [n, m]; references: class ids [n]; k: class counts.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Adds ranked class ids [n, m] and their true classes [n]."""
        # Checked here because the int64 features would silently cut scores down to integers.
        predictions, references = check_ranked(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Adds the ranked class ids [m] and the true class of one item."""
        self.add_batch(predictions=[prediction], references=[reference])

    def _compute(self, predictions: Any, references: Any, k: Sequence[int] = (1, 5)) -> dict[str, float]:
        return top_k_accuracy(predictions, references, k)
