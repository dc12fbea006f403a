"""Re-identification scores: cumulative matching characteristic (CMC) and mean average precision (mAP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

JUNK = -1
# Elements of the distances [queries, gallery] that are sorted at a time: 16 MiB in float32.
CHUNK_ELEMENTS = 2**22


def reid_scores(
    query: Any,
    gallery: Any,
    query_pids: Any,
    gallery_pids: Any,
    query_camids: Any,
    gallery_camids: Any,
    distance: str = "cosine",
    ranks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """CMC and mAP by the single-query protocol of Market-1501 (Zheng et al., ICCV 2015).

    For each query the gallery is ranked by distance; images of the query's identity from its own camera, and junk
    (identity -1), are left out; all others that are not of its identity, distractors (0) among them, count as wrong.
    Average precision is the mean, over the query's matches, of the share of matches among the images up to there.
    Equal distances keep the gallery's order.

    Args:
        query, gallery: features, ``[q, d]`` and ``[g, d]``; compared in float32, or wider if they are.
        query_pids, gallery_pids: identities, whole numbers ``[q]`` and ``[g]``.
        query_camids, gallery_camids: cameras, whole numbers ``[q]`` and ``[g]``.
        distance: ``"cosine"`` or ``"euclidean"``.
        ranks: at which to give the CMC.

    Returns:
        ``mAP`` and ``rank1``, ``rank5``, ..., each in [0, 1], means over the queries that have a match;
        ``queries``, how many these are; ``queries_without_match``, how many are left out.

    Raises:
        ValueError: other shapes or types, features that are not finite, junk among the queries, an unknown distance, a
            rank below 1, or no query with a match.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f"distance is {distance!r}: it has to be 'cosine' or 'euclidean'")
    if len(ranks) == 0 or min(ranks) < 1:
        raise ValueError(f"ranks is {ranks!r}: it has to hold whole numbers from 1 on, such as (1, 5, 10)")
    query, query_pids, query_camids = _checked("query", query, query_pids, query_camids)
    gallery, gallery_pids, gallery_camids = _checked("gallery", gallery, gallery_pids, gallery_camids)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query features have {query.shape[1]} dimensions, gallery features {gallery.shape[1]}")
    if (query_pids == JUNK).any():
        raise ValueError(f"{int((query_pids == JUNK).sum())} queries are junk (identity -1): leave them out")
    if distance == "cosine":
        query, gallery = F.normalize(query), F.normalize(gallery)
    valid = gallery_pids != JUNK
    gallery, gallery_pids, gallery_camids = gallery[valid], gallery_pids[valid], gallery_camids[valid]

    precisions, firsts = [], []
    for rows in torch.arange(len(query)).split(max(1, CHUNK_ELEMENTS // max(1, len(gallery)))):
        distances = -query[rows] @ gallery.T if distance == "cosine" else torch.cdist(query[rows], gallery)
        same = query_pids[rows, None] == gallery_pids
        own_camera = same & (query_camids[rows, None] == gallery_camids)
        order = distances.masked_fill_(own_camera, torch.inf).sort(dim=1, stable=True).indices
        match = (same & ~own_camera).gather(1, order)
        found = match.cumsum(1)
        position = torch.arange(1, match.shape[1] + 1)
        precision = (found / position.double()).masked_fill_(~match, 0).sum(1) / match.sum(1)
        has_match = match.any(1)
        precisions.append(precision[has_match])
        firsts.append(match.int().argmax(1)[has_match] + 1 if match.shape[1] else has_match[:0].long())
    precision, first = torch.cat(precisions), torch.cat(firsts)
    if len(precision) == 0:
        raise ValueError(
            f"none of the {len(query)} queries has a match in the gallery under another camera: check pids and camids"
        )
    scores = {"mAP": float(precision.mean())}
    scores |= {f"rank{rank}": float((first <= rank).double().mean()) for rank in ranks}
    return scores | {"queries": len(precision), "queries_without_match": len(query) - len(precision)}


def _checked(name: str, features: Any, pids: Any, camids: Any) -> tuple[Tensor, Tensor, Tensor]:
    features, pids, camids = (torch.as_tensor(np.asarray(value)) for value in (features, pids, camids))
    if features.dim() != 2 or not features.is_floating_point() or len(features) == 0:
        raise ValueError(
            f"{name} features are {features.dtype} {list(features.shape)}: they have to be floats [n, d], n above 0"
        )
    for what, ids in (("pids", pids), ("camids", camids)):
        if ids.shape != features.shape[:1] or ids.is_floating_point():
            raise ValueError(
                f"{name} {what} are {ids.dtype} {list(ids.shape)}: they have to be {len(features)} whole numbers, one "
                "an image"
            )
    if not features.isfinite().all():
        bad = (~features.isfinite()).any(1).nonzero()[:, 0].tolist()
        raise ValueError(f"{name} features hold NaN or Inf in rows {bad[:10]}")
    return features.to(torch.promote_types(features.dtype, torch.float32)), pids.long(), camids.long()


class ReID(evaluate.Metric):
    """CMC and mAP as an `evaluate` metric that works offline: make one directly, not by ``evaluate.load``.

    Every row is an image, of the query or of the gallery:

        metric = ReID()
        metric.add_batch(features=features, pid=pids, camid=camids, is_query=is_query)  # as often as there are batches
        metric.compute(distance="cosine", ranks=(1, 5, 10))

    Returns what [`reid_scores`] does, which takes query and gallery apart and copies no features.
    """

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any) -> None:
        # In memory, processes that all score the same rows do not queue for one cache file.
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="CMC and mAP by the single-query protocol of Market-1501.",
            citation="",
            inputs_description="features [n, d]; pid, camid [n]; is_query [n]: of the query, or of the gallery.",
            features=datasets.Features(
                {
                    "features": datasets.Sequence(datasets.Value("float32")),
                    "pid": datasets.Value("int64"),
                    "camid": datasets.Value("int64"),
                    "is_query": datasets.Value("bool"),
                }
            ),
        )

    def _compute(
        self,
        features: Any,
        pid: Any,
        camid: Any,
        is_query: Any,
        distance: str = "cosine",
        ranks: Sequence[int] = (1, 5, 10),
    ) -> dict[str, float]:
        features, is_query = np.asarray(features, dtype=np.float32), np.asarray(is_query)
        apart = [
            part for values in (features, np.asarray(pid), np.asarray(camid)) for part in _split(values, is_query)
        ]
        return reid_scores(*apart, distance=distance, ranks=ranks)


def _split(values: np.ndarray, is_query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values[is_query], values[~is_query]
