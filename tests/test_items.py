"""The items of a batch: supervised tokens or examples, on the device of the batch."""

import pytest
import torch
from fake_cuda import fake_cuda

from hf_dis.errors import DataError
from hf_dis.items import FILLER, Items, check_labels, first_examples, stored_items, token_items

LABELS = torch.tensor([[5, -100, 7, 8], [-100, 2, 3, -100]])
SHAPE = LABELS.shape


def test_supervised_tokens_have_a_label():
    items = token_items(LABELS, None, SHAPE, shifts_labels=False)
    assert len(items) == 5 and items.num_examples == 2 and items.length == 4
    assert items.positions.tolist() == [0, 2, 3, 5, 6]
    assert items.labels.tolist() == [5, 7, 8, 2, 3]


def test_a_causal_model_answers_for_the_next_token():
    items = token_items(LABELS, None, SHAPE, shifts_labels=True)
    assert items.positions.tolist() == [1, 2, 4, 5]
    assert items.labels.tolist() == [7, 8, 2, 3]


@pytest.mark.parametrize("shifts_labels", [False, True])
def test_without_labels_every_token_but_padding_is_an_item(shifts_labels):
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    items = token_items(None, mask, SHAPE, shifts_labels)
    assert items.labels is None and items.positions.tolist() == [0, 1, 2, 5, 6, 7]
    assert len(token_items(None, None, SHAPE, shifts_labels)) == 8


def test_no_supervised_token():
    items = token_items(torch.full(SHAPE, -100), None, SHAPE, shifts_labels=True)
    assert len(items) == 0 and len(items.labels) == 0 and items.of(torch.randn(2, 4, 3)).shape == (0, 3)
    assert items.sums_by_example(torch.empty(0)).tolist() == [0, 0]


def test_values_of_items():
    values = torch.arange(8).view(2, 4, 1)
    assert token_items(LABELS, None, SHAPE, False).of(values)[:, 0].tolist() == [0, 2, 3, 5, 6]
    assert torch.equal(Items(2).of(values), values) and len(Items(2)) == 2


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 3, 3), (8, 3)], ids=["more", "fewer", "flat"])
def test_values_of_other_tokens_are_refused(shape):
    items = token_items(LABELS, None, SHAPE, shifts_labels=False)
    with pytest.raises(ValueError, match=rf"logits of \({shape[0]}, {shape[1]}\) tokens for the \(2, 4\).*LoRA"):
        items.of(torch.zeros(shape))


def test_sums_by_example():
    items = token_items(LABELS, None, SHAPE, shifts_labels=False)
    assert items.sums_by_example(torch.tensor([1.0, 2, 3, 10, 20])).tolist() == [6, 30]
    assert Items(2).sums_by_example(torch.tensor([1.0, 2])).tolist() == [1, 2]


def test_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"labels have shape \(2,\) for tokens of shape \(2, 4\).*-100"):
        token_items(torch.tensor([1, 2]), None, SHAPE, shifts_labels=False)


def test_sequences_of_length_one():
    with pytest.raises(ValueError, match=r"length 1.*two tokens or more"):
        token_items(LABELS[:, :1], None, LABELS[:, :1].shape, shifts_labels=True)
    assert len(token_items(LABELS[:, :1], None, LABELS[:, :1].shape, shifts_labels=False)) == 1


def test_positions_are_made_on_the_device_of_the_batch():
    """Without labels and mask there is no tensor that would tell the device."""
    assert token_items(None, None, SHAPE, False, torch.device("meta")).positions.device.type == "meta"
    mask = torch.ones(SHAPE)
    assert token_items(None, mask, SHAPE, False, torch.device("meta")).positions.device.type == "cpu"


@pytest.mark.parametrize("labels", [torch.tensor([0, 4]), torch.tensor([], dtype=torch.long)])
def test_labels_within_the_classes(labels):
    check_labels(labels, 5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5, -1, 5]), r"labels \[-1, 5\] are outside 0..4: teacher and student share 5 classes"),
        (torch.tensor([0.0, 1.0]), r"labels are torch.float32: .*whole numbers 0..4"),
        (torch.tensor([True]), r"labels are torch.bool: .*whole numbers 0..4"),
    ],
)
def test_labels_that_are_no_class_ids(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 5)


def test_the_first_examples_of_a_batch():
    inputs = {"input_ids": LABELS, "attention_mask": torch.ones(SHAPE), "use_cache": False}
    first = first_examples(inputs, token_items(LABELS, None, SHAPE, shifts_labels=True), 1)
    assert first["input_ids"].tolist() == [[5, -100, 7, 8]] and first["attention_mask"].shape == (1, 4)
    assert first["use_cache"] is False


@pytest.mark.parametrize(("number", "stop"), [(1, 3), (2, 5), (3, 9), (7, 9)])
def test_the_first_documents_of_a_padding_free_batch(number, stop):
    ids = torch.arange(9)[None]
    inputs = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]]),
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 9]),
        "max_length_q": 4,
        "use_cache": False,
    }
    first = first_examples(inputs, token_items(ids, None, ids.shape, shifts_labels=True), number)
    assert first.keys() == {"input_ids", "position_ids", "seq_idx", "use_cache"}
    assert first["input_ids"].tolist() == [list(range(stop))]
    assert all(value.shape == (1, stop) for value in first.values() if isinstance(value, torch.Tensor))


STORED = torch.full((2, 3, 6), FILLER, dtype=torch.uint8)
STORED[0], STORED[1, :2] = torch.arange(18).view(3, 6), torch.arange(18, 30).view(2, 6)


@pytest.mark.parametrize("given", [{}, {"positions": torch.tensor([0, 2, 3, 5, 6])}])
def test_stored_targets_of_items(given):
    items = token_items(LABELS, None, SHAPE, shifts_labels=False, stored=STORED, **given)
    assert items.positions.tolist() == [0, 2, 3, 5, 6] and items.labels.tolist() == [5, 7, 8, 2, 3]
    assert items.targets.flatten().tolist() == list(range(30))
    assert torch.equal(stored_items(STORED), items.targets)


@pytest.mark.parametrize("mask", [None, torch.ones(SHAPE)])
def test_stored_targets_of_another_number_of_items(mask):
    with pytest.raises(DataError, match=r"targets of 5 items for this batch, and 4 are supervised: mask the labels"):
        token_items(LABELS, None, SHAPE, shifts_labels=True, stored=STORED)
    with pytest.raises(DataError, match=r"targets of 5 items for this batch, and 8 are supervised"):
        token_items(None, mask, SHAPE, shifts_labels=False, stored=STORED)


@pytest.mark.parametrize(
    ("given", "waits"),
    [
        ({}, 1),
        ({"stored": STORED}, 1),
        ({"positions": torch.tensor([0, 2, 3, 5, 6])}, 0),
        ({"positions": torch.tensor([0, 2, 3, 5, 6]), "stored": STORED}, 0),
    ],
    ids=["labels", "stored", "known", "known, stored"],
)
def test_waits_for_an_accelerator(given, waits):
    with fake_cuda({"tolist": [5, 5]}) as counts:
        there = {name: value.to("cuda") for name, value in given.items()}
        items = token_items(torch.empty(SHAPE, dtype=torch.long, device="cuda"), None, SHAPE, False, **there)
    assert sum(counts.waits.values()) == waits and items.labels.is_cuda
    assert "stored" not in given or items.targets.shape == (5, 6)
