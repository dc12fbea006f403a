"""benchmarks/peer_students.py: the losses of peers that leave classes out, against their definitions in float64."""

import peer_students
import pytest
import torch

ITEMS, CLASSES, K = 70, 50, 6


@pytest.fixture
def given():
    """Features and head of a student and of a teacher, and labels; more items than a chunk has."""
    torch.manual_seed(0)
    sizes = (ITEMS, 4), (CLASSES, 4), (ITEMS, 5), (CLASSES, 5)
    features, weight, *teacher = (torch.randn(size, dtype=torch.float64) for size in sizes)
    return features.requires_grad_(), weight.requires_grad_(), *teacher, torch.randint(3, (ITEMS,))


def assert_same(given, loss, expected):
    """The loss and its gradients are those of a definition."""
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, given[:2])
    torch.testing.assert_close(torch.autograd.grad(loss, given[:2]), wanted)


SHARES = pytest.mark.parametrize("share", [0.0, 0.3])


def mixture(kl, student, labels, share):
    """(1 - λ) KL + λ CE, both means over items."""
    return (1 - share) * kl - share * student.gather(1, labels[:, None]).log().mean()


@SHARES
def test_a_bucket_has_the_probability_of_all_other_classes(given, share):
    student, teacher = ((given[at] @ given[at + 1].T).softmax(1) for at in (0, 2))
    expected = 0.0
    for s, p in zip(student, teacher, strict=True):
        ids = p.argsort(descending=True)[:K]
        expected = expected + (p[ids] * (p[ids] / s[ids]).log()).sum()
        expected = expected + (1 - p[ids].sum()) * ((1 - p[ids].sum()) / (1 - s[ids].sum())).log()
    expected = mixture(expected / ITEMS, student, given[4], share)
    assert_same(given, peer_students.topk_bucket(*given, k=K, hard_label_weight=share), expected)


@SHARES
def test_negatives_are_the_labels_and_uniform_classes(given, share, monkeypatch):
    labels = given[4].unique()
    monkeypatch.setattr(torch, "rand", lambda number, **_: torch.arange(number) / number)
    ids = torch.cat([labels, torch.arange(CLASSES - K + len(labels), CLASSES)])
    student, teacher = ((given[at] @ given[at + 1][ids].T).softmax(1) for at in (0, 2))
    expected = (teacher * (teacher / student).log()).sum() / ITEMS
    expected = mixture(expected, student, torch.searchsorted(labels, given[4]), share)
    assert_same(given, peer_students.negatives(*given, k=K, hard_label_weight=share), expected)


def test_all_labels_are_among_the_negatives_where_there_are_more_of_them(given):
    labels = torch.arange(ITEMS) % CLASSES
    student, teacher = ((given[at] @ given[at + 1].T).softmax(1) for at in (0, 2))
    expected = (teacher * (teacher / student).log()).sum() / ITEMS
    assert_same(given, peer_students.negatives(*given[:4], labels, k=K), expected)
