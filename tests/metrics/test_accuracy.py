import numpy as np
import pytest
import torch

from hf_dis.metrics import TopKAccuracy
from hf_dis.metrics.accuracy import top_k_accuracy

RANKED = [[3, 1, 2], [0, 4, 1], [2, 3, 0], [1, 0, 4]]
REFERENCES = [3, 1, 3, 2]


@pytest.fixture
def metric(tmp_path):
    return TopKAccuracy(cache_dir=tmp_path)


def test_counts_the_items_whose_class_is_among_the_first_k(metric):
    expected = {"top1": 0.25, "top2": 0.5, "top3": 0.75}
    assert top_k_accuracy(RANKED, REFERENCES, k=(1, 2, 3)) == expected
    assert metric.compute(predictions=RANKED, references=REFERENCES, k=(1, 2, 3)) == expected


def test_agrees_with_the_definition_on_logits(metric):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 20, generator=generator)
    labels = torch.randint(20, (500,), generator=generator)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    expected = {f"top{k}": (rank < k).double().mean().item() for k in (1, 5)}
    assert metric.compute(predictions=logits.topk(5).indices, references=labels) == pytest.approx(expected)


def test_batches_add_up(metric):
    metric.add_batch(predictions=np.array(RANKED[:3]), references=np.array(REFERENCES[:3]))
    metric.add(prediction=RANKED[3], reference=REFERENCES[3])
    assert metric.compute(k=(1, 3)) == {"top1": 0.25, "top3": 0.75}
    assert metric.compute(predictions=RANKED[:1], references=[3], k=(1,)) == {"top1": 1.0}, "starts afresh"


def test_keeps_nothing_on_disk(metric, tmp_path):
    metric.add_batch(predictions=RANKED, references=REFERENCES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("compute", ["function", "metric"])
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"k": (1, 5)},
            r"top-5 accuracy needs 5 ranked classes per item, and predictions have 3: take logits\.topk\(5\)",
        ),
        ({"k": (0, 1)}, r"k is \(0, 1\): it has to be a sequence of positive integers, such as \(1, 5\)"),
        ({"k": ()}, r"k is \(\): it has to be a sequence"),
        ({"k": 5}, "k is 5: it has to be a sequence"),
        (
            {"predictions": np.zeros((4, 3))},
            r"predictions are float64 \[4, 3\]: they have to be ranked class ids, .* take logits",
        ),
        ({"predictions": [1, 2, 3, 4]}, r"predictions are int64 \[4\]: .* integers \[n, m\] by falling score"),
        ({"predictions": [[1], [2, 3], [1], [1]]}, "different numbers of ranked classes"),
        ({"references": [1, 2, 3]}, r"references are int64 \[3\]: they have to be 4 class ids"),
        ({"references": [[1], [2], [3], [4]]}, r"references are int64 \[4, 1\]: they have to be 4 class ids"),
        ({"references": [1.0, 2.0, 3.0, 4.0]}, r"references are float64 \[4\]: they have to be 4 class ids"),
        ({"references": None}, r"references are object \[\]: they have to be 4 class ids"),
        ({"references": [1, 2, -100, 4]}, "references hold -100: leave out ignored positions"),
        ({"predictions": np.zeros((0, 3), int), "references": np.zeros(0, int)}, "no predictions to score"),
    ],
)
def test_unusable_input(compute, changes, message, metric):
    arguments = {"predictions": RANKED, "references": REFERENCES, "k": (1,), **changes}
    with pytest.raises(ValueError, match=message):
        if compute == "metric":
            metric.compute(**arguments)
        else:
            top_k_accuracy(arguments["predictions"], arguments["references"], arguments["k"])


def test_batches_of_different_width(metric):
    metric.add_batch(predictions=[[1, 2]], references=[1])
    metric.add_batch(predictions=[[1, 2, 3]], references=[1])
    with pytest.raises(ValueError, match="different numbers of ranked classes"):
        metric.compute(k=(1,))


def test_single_scores_are_not_cut_down_to_ids(metric):
    with pytest.raises(ValueError, match="ranked class ids"):
        metric.add(prediction=[0.3, 2.7], reference=2)
