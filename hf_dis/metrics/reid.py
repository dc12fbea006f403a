"""Re-identification scores: cumulative matching characteristic (CMC) and mean average precision (mAP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

    For each query the gallery is ranked by distance. Images of the query's identity from its own camera, and junk
    (identity -1), are left out. All other images, distractors (0) included, count as wrong. Average precision is the
    mean, over the query's matches, of the share of matches up to there. Ties keep the gallery's order.

    Args:
        query: features of the queries, ``[q, d]``; compared in float32, or in their own type if it is wider.
        gallery: features of the gallery, ``[g, d]``.
        query_pids: identities of the queries, integers ``[q]``.
        gallery_pids: identities of the gallery, integers ``[g]``.
        query_camids: cameras of the queries, integers ``[q]``.
        gallery_camids: cameras of the gallery, integers ``[g]``.
        distance: ``"cosine"`` or ``"euclidean"``.
        ranks: ranks of the CMC, from 1 on.

    Returns:
        ``mAP`` and ``rank1``, ``rank5``, ..., each in [0, 1], means over the queries that have a match; ``queries``,
        the number of these queries; ``queries_without_match``, the number of the queries left out.

    Raises:
        ValueError: if shapes or types differ from these, features are not finite, a query is junk, the distance is
            unknown, a rank is below 1, or no query has a match.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f"distance is {distance!r}: it has to be 'cosine' or 'euclidean'")
    if len(ranks) == 0 or min(ranks) < 1:
        raise ValueError(f"ranks is {ranks!r}: it has to hold integers from 1 on, such as (1, 5, 10)")
    query = _Images.checked("query", query, query_pids, query_camids)
    gallery = _Images.checked("gallery", gallery, gallery_pids, gallery_camids)
    if query.features.shape[1] != gallery.features.shape[1]:
        widths = f"{query.features.shape[1]} dimensions, gallery features {gallery.features.shape[1]}"
        raise ValueError(f"query features have {widths}: both have to come from one model")
    if num_junk := int((query.pids == JUNK).sum()):
        raise ValueError(f"{num_junk} queries are junk (identity -1): leave them out")
    if distance == "cosine":
        query, gallery = (images._replace(features=F.normalize(images.features)) for images in (query, gallery))
    gallery = gallery.at(gallery.pids != JUNK)
    size = max(1, CHUNK_ELEMENTS // max(1, len(gallery.pids)))
    chunks = torch.arange(len(query.pids)).split(size)
    parts = [_ranked(query.at(chunk), gallery, distance) for chunk in chunks]
    precision, first = (torch.cat(values) for values in zip(*parts, strict=True))
    if len(precision) == 0:
        raise ValueError(
            f"none of the {len(query.pids)} queries has a match in the gallery under another camera: check pids and "
            "camids"
        )
    scores = {"mAP": float(precision.mean())}
    scores |= {f"rank{rank}": float((first <= rank).double().mean()) for rank in ranks}
    return scores | {"queries": len(precision), "queries_without_match": len(query.pids) - len(precision)}


class _Images(NamedTuple):
    """Images of one split: features ``[n, d]``, identities ``[n]`` and cameras ``[n]``."""

    features: Tensor
    pids: Tensor
    camids: Tensor

    def at(self, index: Tensor) -> _Images:
        """Some of the images."""
        return _Images(*(values[index] for values in self))

    @classmethod
    def checked(cls, name: str, features: Any, pids: Any, camids: Any) -> _Images:
        """The images of the split ``name``, as tensors of the types that are compared."""
        features, pids, camids = (torch.as_tensor(np.asarray(value)) for value in (features, pids, camids))
        if features.dim() != 2 or not features.is_floating_point() or len(features) == 0:
            raise ValueError(
                f"{name} features are {features.dtype} {list(features.shape)}: they have to be floats [n, d], n above "
                "0"
            )
        for kind, ids in (("pids", pids), ("camids", camids)):
            if ids.shape != features.shape[:1] or ids.is_floating_point():
                raise ValueError(
                    f"{name} {kind} are {ids.dtype} {list(ids.shape)}: they have to be {len(features)} integers, one "
                    "per image"
                )
        if not features.isfinite().all():
            bad = (~features.isfinite()).any(1).nonzero()[:, 0].tolist()
            raise ValueError(f"{name} features hold NaN or Inf for the images {bad[:10]}: check the model's input")
        return cls(features.to(torch.promote_types(features.dtype, torch.float32)), pids.long(), camids.long())


def _ranked(query: _Images, gallery: _Images, distance: str) -> tuple[Tensor, Tensor]:
    """Average precision and the rank of the first match, of the queries that have a match: ``[n]`` each."""
    if distance == "cosine":
        distances = -query.features @ gallery.features.T
    else:
        distances = torch.cdist(query.features, gallery.features)
    same = query.pids[:, None] == gallery.pids
    own_camera = same & (query.camids[:, None] == gallery.camids)
    order = distances.masked_fill_(own_camera, torch.inf).sort(dim=1, stable=True).indices
    match = (same & ~own_camera).gather(1, order)
    found = match.cumsum(1)
    position = torch.arange(1, match.shape[1] + 1)
    precision = (found / position.double()).masked_fill_(~match, 0).sum(1) / match.sum(1)
    has_match = match.any(1)
    first = match.int().argmax(1)[has_match] + 1 if match.shape[1] else has_match[:0].long()
    return precision[has_match], first


class ReID(evaluate.Metric):
    """CMC and mAP as an ``evaluate`` metric that works offline; construct it without ``evaluate.load``.

    Every example is an image, of the query or of the gallery:

        metric = ReID()
        metric.add_batch(features=features, pid=pids, camid=camids, is_query=is_query)  # for each batch
        metric.compute(distance="cosine", ranks=(1, 5, 10))

    ``compute`` returns the result of :func:`reid_scores`, which takes query and gallery apart and copies no features.
    """

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any) -> None:
        # On disk, processes that score the same images would queue for one cache file.
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="CMC and mAP by the single-query protocol of Market-1501.",
            citation="",
            inputs_description="features [n, d]; pid, camid [n]; is_query [n]: in the query, or in the gallery.",
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
