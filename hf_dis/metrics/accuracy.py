"""Top-k accuracy from ranked class ids, so that nobody has to keep a score for every class of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


def top_k_accuracy(ranked: Any, references: Any, k: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The share of rows whose true class is among the first k, for each k.

    Args:
        ranked: class ids by falling score, whole numbers ``[n, m]`` with m at least ``max(k)``.
        references: true class ids, whole numbers ``[n]``.
        k: how many classes to look at; one result each.

    Returns:
        ``{"top1": ..., "top5": ...}``, named after ``k``, each in [0, 1].

    Raises:
        ValueError: other shapes or types, a negative reference, or a ``k`` below 1 or above m.
    """
    ranked, references = _check_inputs(ranked, references)
    if isinstance(k, int) or len(k) == 0 or min(k) < 1:
        raise ValueError(f"k should be a sequence of positive whole numbers such as (1, 5), got {k!r}.")
    if max(k) > ranked.shape[1]:
        raise ValueError(
            f"top-{max(k)} accuracy needs {max(k)} ranked classes a row, predictions have {ranked.shape[1]}: "
            f"take logits.topk({max(k)}).indices, or pass a smaller k."
        )
    hits = ranked == references[:, None]
    return {f"top{depth}": float(hits[:, :depth].any(axis=1).mean()) for depth in k}


def _check_inputs(ranked: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        ranked, references = np.asarray(ranked), np.asarray(references)
    except ValueError as error:
        raise ValueError("predictions should have equally many ranked classes in every row.") from error
    if ranked.ndim != 2 or ranked.dtype.kind not in "iu":
        raise ValueError(
            "predictions should be ranked class ids, whole numbers [n, m] by falling score, got "
            f"{ranked.dtype} {list(ranked.shape)}: from logits, take logits.topk(5).indices."
        )
    if references.shape != ranked.shape[:1] or references.dtype.kind not in "iu":
        raise ValueError(
            f"references should be {len(ranked)} class ids, as many as predictions have rows, got "
            f"{references.dtype} {list(references.shape)}."
        )
    if len(references) == 0:
        raise ValueError("There are no predictions to score.")
    if references.min() < 0:
        raise ValueError(f"references holds {references.min()}: leave out ignored positions (-100) first.")
    return ranked, references


class TopKAccuracy(evaluate.Metric):
    """Top-k accuracy as an `evaluate` metric that works offline: make one directly, not by ``evaluate.load``.

    It takes ranked class ids rather than scores, because a score for every class of every evaluated row is
    what a huge output layer cannot afford. Let the Trainer keep only the first few of each batch:

        metric = TopKAccuracy()
        trainer = Trainer(
            ...,
            preprocess_logits_for_metrics=lambda logits, labels: logits.topk(5).indices,
            compute_metrics=lambda p: metric.compute(predictions=p.predictions, references=p.label_ids),
        )

    ``compute(predictions=..., references=..., k=(1, 5))`` takes and returns what [`top_k_accuracy`] does.
    """

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any) -> None:
        # In memory, processes that all score the same rows do not queue for one cache file.
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of rows whose true class is among the k highest scored.",
            citation="",
            inputs_description="predictions: ranked class ids [n, m]; references: class ids [n]; k: which k.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Adds ranked class ids [n, m] and their true classes [n]."""
        # Checked here because the int64 features would cut scores down to whole numbers without a word.
        predictions, references = _check_inputs(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Adds the ranked class ids [m] and the true class of one row."""
        self.add_batch(predictions=[prediction], references=[reference])

    def _compute(self, predictions: Any, references: Any, k: Sequence[int] = (1, 5)) -> dict[str, float]:
        return top_k_accuracy(predictions, references, k)
