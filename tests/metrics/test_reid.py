"""CMC and mAP against the protocol written out image by image."""

import math

import numpy as np
import pytest

from hf_dis.metrics import ReID
from hf_dis.metrics import reid as module
from hf_dis.metrics.reid import reid_scores

NAMES = ("query", "gallery", "query_pids", "gallery_pids", "query_camids", "gallery_camids")


def literal(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, distance="cosine"):
    """The protocol for one query and one image at a time."""
    precisions, firsts, without = [], [], 0
    for features, pid, camera in zip(query.tolist(), query_pids, query_camids, strict=True):
        ranked = []
        for index, (others, other_pid, other_camera) in enumerate(
            zip(gallery.tolist(), gallery_pids, gallery_camids, strict=True)
        ):
            if other_pid == -1 or (other_pid == pid and other_camera == camera):
                continue
            if distance == "cosine":
                product = sum(a * b for a, b in zip(features, others, strict=True))
                far = -product / (math.hypot(*features) * math.hypot(*others))
            else:
                far = math.dist(features, others)
            ranked.append((round(far, 10), index, other_pid == pid))
        ranked.sort()
        positions = [place for place, (_, _, match) in enumerate(ranked, 1) if match]
        if not positions:
            without += 1
            continue
        precisions.append(sum((n / place) for n, place in enumerate(positions, 1)) / len(positions))
        firsts.append(positions[0])
    scores = {f"rank{k}": sum(first <= k for first in firsts) / len(firsts) for k in (1, 5, 10)}
    return {"mAP": sum(precisions) / len(firsts), **scores, "queries": len(firsts), "queries_without_match": without}


def case(seed, identities=8, cameras=3, num_query=30, num_gallery=80, grid=False):
    """Random features; on a grid of few values many distances are equal."""
    rng = np.random.default_rng(seed)
    if grid:
        query, gallery = (rng.integers(0, 2, (n, 4)).astype(float) for n in (num_query, num_gallery))
    else:
        query, gallery = (rng.normal(size=(n, 6)) for n in (num_query, num_gallery))
    pids = rng.integers(1, identities + 1, num_query), rng.integers(-1, identities + 1, num_gallery)
    camids = rng.integers(1, cameras + 1, num_query), rng.integers(1, cameras + 1, num_gallery)
    return query, gallery, *pids, *camids


@pytest.mark.parametrize("chunk", [1, 1000, 2**22])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_protocol_written_out(monkeypatch, seed, distance, chunk):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    given = case(seed)
    assert reid_scores(*given, distance=distance) == pytest.approx(literal(*given, distance=distance), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_equal_distances_keep_the_order_of_the_gallery(seed):
    given = case(seed, grid=True)
    assert reid_scores(*given, distance="euclidean") == pytest.approx(literal(*given, "euclidean"), abs=1e-9)


def test_queries_without_a_match_are_counted_and_left_out():
    query, gallery, query_pids, *rest = case(0)
    query_pids[:7] = 99
    scores = reid_scores(query, gallery, query_pids, *rest)
    assert scores["queries_without_match"] == 7 and scores["queries"] == 23
    assert scores == pytest.approx(literal(query, gallery, query_pids, *rest), abs=1e-9)


def test_a_known_case():
    """The nearest image is of the same camera, the next one junk: both are passed over. Then wrong, right, right."""
    query, gallery = np.array([[0.0]]), np.array([[0.1], [0.2], [0.3], [0.4], [0.5]])
    scores = reid_scores(
        query, gallery, [5], [5, -1, 0, 5, 5], [1], [1, 2, 2, 2, 3], distance="euclidean", ranks=(1, 2)
    )
    assert scores == pytest.approx(
        {"mAP": (1 / 2 + 2 / 3) / 2, "rank1": 0.0, "rank2": 1.0, "queries": 1, "queries_without_match": 0}
    )


def single_camera(given):
    return (*given[:4], np.ones(len(given[4]), int), np.ones(len(given[5]), int))


def all_junk(given):
    return (*given[:3], np.full(len(given[3]), -1), *given[4:])


@pytest.mark.parametrize("change", [single_camera, all_junk])
def test_no_query_with_a_match_is_an_error(change):
    with pytest.raises(ValueError, match="none of the 30 queries has a match"):
        reid_scores(*change(case(0)))


@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_metric_takes_images_batch_by_batch(num_batches):
    given = dict(zip(NAMES, case(0), strict=True))
    images = [np.concatenate([given[f"query{part}"], given[f"gallery{part}"]]) for part in ("", "_pids", "_camids")]
    columns = {**dict(zip(("features", "pid", "camid"), images, strict=True)), "is_query": np.arange(110) < 30}
    metric = ReID()
    for batch in range(num_batches):
        metric.add_batch(**{name: values[batch::num_batches] for name, values in columns.items()})
    assert metric.compute() == pytest.approx(reid_scores(*given.values()), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", np.zeros((30, 5)), r"query features have 5 dimensions, gallery features 6"),
        ("query", np.zeros(30), r"query features are torch.float64 \[30\]"),
        ("query", np.zeros((0, 6)), r"n above 0"),
        ("gallery", np.full((80, 6), np.nan), r"gallery features hold NaN or Inf for the images \[0, 1"),
        ("query_pids", np.full(30, -1), r"30 queries are junk"),
        ("gallery_pids", np.zeros(79, int), r"gallery pids are torch.int64 \[79\].*80 integers"),
        ("gallery_camids", np.zeros(80), r"gallery camids are torch.float64"),
        ("distance", "manhattan", r"distance is 'manhattan'"),
        ("ranks", (0, 1), r"ranks is \(0, 1\)"),
    ],
    ids=range(9),
)
def test_bad_input(name, value, message):
    with pytest.raises(ValueError, match=message):
        reid_scores(**{**dict(zip(NAMES, case(0), strict=True)), name: value})
