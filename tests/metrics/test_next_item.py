import numpy as np
import pytest
import torch

from hf_dis import ShardedHead
from hf_dis.metrics import NextItem, next_item_scores, top_ranked
from hf_dis.metrics import next_item as module

RANKED = [[3, 1, 2], [4, 5, 1], [2, 3, 4], [1, 5, 4]]
REFERENCES = [3, 1, 3, 2]


def by_definition(scores, references, k):
    """NDCG and recall from float64 scores of all items: discounted gains of the ranking over those of the ideal."""
    ndcg, recall = [], []
    for row, true in zip(scores, references, strict=True):
        order = sorted(range(1, len(row)), key=lambda item: -row[item])
        gains = [float(item == true) for item in order]
        discounted, ideal = (
            sum(gain / np.log2(place + 2) for place, gain in enumerate(values[:k]))
            for values in (gains, sorted(gains, reverse=True))
        )
        ndcg.append(discounted / ideal)
        recall.append(sum(gains[:k]) / sum(gains))
    return {f"ndcg{k}": np.mean(ndcg), f"recall{k}": np.mean(recall)}


def test_by_hand():
    ndcg3 = (1 + 1 / np.log2(4) + 1 / np.log2(3) + 0) / 4
    expected = {"ndcg1": 0.25, "recall1": 0.25, "ndcg3": pytest.approx(ndcg3, abs=1e-12), "recall3": 0.75}
    assert next_item_scores(RANKED, REFERENCES, k=(1, 3)) == expected
    metric = NextItem()
    metric.add_batch(predictions=np.array(RANKED[:3]), references=REFERENCES[:3])
    metric.add(prediction=RANKED[3], reference=REFERENCES[3])
    assert metric.compute(k=(1, 3)) == expected


@pytest.mark.parametrize("tile", [7, 2**16])
def test_agrees_with_the_definition_on_all_items(tile, monkeypatch):
    monkeypatch.setattr(module, "TILE_CLASSES", tile)
    monkeypatch.setattr(module, "TILE_ELEMENTS", 16 * tile)
    generator = torch.Generator().manual_seed(0)
    features, weight, bias = (torch.randn(*size, generator=generator).double() for size in ((90, 6), (41, 6), (41,)))
    references = torch.randint(1, 41, (90,), generator=generator)
    scores = features @ weight.T + bias
    ranked = top_ranked(features, weight, bias, k=10, first_class=1)
    assert torch.equal(ranked, scores[:, 1:].topk(10).indices + 1)
    head = ShardedHead(6, 41, dtype=torch.float64)
    head.copy_rows(weight, bias)
    assert torch.equal(head.top_k(features, 10)[1], scores.topk(10).indices)
    found = NextItem().compute(predictions=ranked, references=references)
    assert found == pytest.approx(by_definition(scores.tolist(), references.tolist(), 10), abs=1e-12)


def test_scores_of_all_classes_are_never_held(monkeypatch):
    monkeypatch.setattr(module, "TILE_CLASSES", 100)
    monkeypatch.setattr(module, "TILE_ELEMENTS", 1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
                largest = max(largest, result.numel())
            return result

    features, weight = torch.randn(50, 8), torch.randn(1000, 8)
    given = {tensor.untyped_storage().data_ptr() for tensor in (features, weight)}
    with Watch():
        top_ranked(features, weight)
    assert largest <= 1000


def test_scores_that_are_no_numbers_rank_nothing():
    features, weight = torch.ones(3, 2), torch.randn(20, 2)
    weight[5] = torch.nan
    with pytest.raises(ValueError, match="scores of 3 of 3 vectors hold NaN or Inf"):
        top_ranked(features, weight)
    assert len(top_ranked(features, weight, first_class=6)) == 3  # classes that are not ranked may be anything


@pytest.mark.parametrize(("k", "first"), [(0, 0), (21, 0), (20, 1)])
def test_more_classes_than_there_are(k, first):
    with pytest.raises(ValueError, match=f"k is {k}: it has to be from 1 to {20 - first}"):
        top_ranked(torch.ones(3, 2), torch.ones(20, 2), k=k, first_class=first)
    with pytest.raises(ValueError, match="top-4 accuracy needs 4"):
        next_item_scores(RANKED, REFERENCES, k=(4,))


def test_no_features_have_no_ranking():
    assert top_ranked(torch.ones(0, 2), torch.ones(20, 2)).shape == (0, 10)


def test_scores_in_place_of_ids_are_refused():
    with pytest.raises(ValueError, match="predictions are float64"):
        NextItem().add_batch(predictions=np.zeros((4, 10)), references=REFERENCES)
