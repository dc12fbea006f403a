"""Keys of examples: the same content has the same key wherever it stands, and nothing else has it."""

import pytest
import torch

from hf_dis.cache.keys import content_keys, key_inputs
from hf_dis.errors import DataError


def tokens(*items, side="right"):
    """Sequences of ids padded to one length, as a tokenizer pads them, labels included."""
    length = max(map(len, items))

    def padded(item, filler):
        fill = [filler] * (length - len(item))
        return item + fill if side == "right" else fill + item

    return {
        "input_ids": torch.tensor([padded(item, 0) for item in items]),
        "attention_mask": torch.tensor([padded([1] * len(item), 0) for item in items]),
        "labels": torch.tensor([padded(item, -100) for item in items]),
    }


def keys(batch):
    return content_keys(batch, key_inputs(batch))


def test_each_image_has_a_key_of_its_own():
    images = torch.randn(6, 3, 8, 8)
    found = keys({"pixel_values": images, "labels": torch.arange(6)})
    assert len(set(found)) == 6
    assert keys({"labels": torch.zeros(6), "pixel_values": images.flip(0)}) == found[::-1]


def test_the_least_change_makes_another_key():
    images = torch.rand(2, 3, 8, 8)
    changed = images.clone()
    changed[1, 2, 7, 7] = torch.nextafter(changed[1, 2, 7, 7], torch.tensor(2.0))
    before, after = (keys({"pixel_values": pixels}) for pixels in (images, changed))
    assert before[0] == after[0] and before[1] != after[1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_matter(side):
    short, long = [5, 6, 7], [8, 9, 1, 2, 3]
    assert keys(tokens(short, long, side=side))[0] == keys(tokens(short))[0]


def test_what_is_supervised_matters():
    batch, masked = tokens([5, 6, 7, 8]), tokens([5, 6, 7, 8])
    masked["labels"][0, :2] = -100
    assert keys(batch) != keys(masked)


@pytest.mark.parametrize("side", ["right", "left"])
def test_where_the_supervised_tokens_are_matters(side):
    """The same token twice, of which the first or the last is supervised: the supervised spans are equal."""
    other = [8, 9, 1, 2, 3]
    found = []
    for ignored in (1, 2):
        alone, padded = tokens([5, 6, 6]), tokens([5, 6, 6], other, side=side)
        for batch, start in ((alone, 0), (padded, 2 if side == "left" else 0)):
            batch["labels"][0, [start, start + ignored]] = -100
        assert keys(alone)[0] == keys(padded)[0]
        found += keys(alone)
    assert found[0] != found[1]


def test_labels_of_a_decoder_count_from_their_start():
    """The labels may have the shape of the encoder's mask by chance."""
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 8, 9]])

    def found(tokens, labels, **masks):
        return keys({"input_ids": tokens, "labels": torch.tensor([labels]), **masks})[0]

    mask = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    padded = torch.tensor([[0, 0, 5, 6, 7]])
    assert found(padded, [3, 4, -100, -100, -100], **mask) == found(short, [3, 4])
    assert found(long, [3, 3, -100]) != found(long, [-100, 3, 3])
    assert found(long, [-100, 3, 3]) == found(long, [-100, 3, 3, -100])
    own = {"decoder_attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    assert found(long, [-100, -100, 3, 4, -100], **own) == found(long, [3, 4, -100])


def test_nothing_supervised():
    batch, padded = tokens([5, 6]), tokens([5, 6], [7, 8, 9], side="left")
    batch["labels"][:], padded["labels"][0] = -100, -100
    assert keys(batch)[0] == keys(padded)[0]


def test_decoder_inputs_made_from_labels_do_not_count():
    batch = tokens([5, 6, 7])
    with_decoder = batch | {"decoder_input_ids": torch.tensor([[0, 5, 6]])}
    assert keys(batch) == keys(with_decoder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_any_dtype(dtype):
    images = (100 * torch.rand(2, 4)).to(dtype)
    assert keys({"pixel_values": images}) != keys({"pixel_values": images.float()})


def test_a_missing_input_is_named():
    with pytest.raises(DataError, match=r"made of input_ids, token_type_ids, and the batch has no token_type_ids"):
        content_keys({"input_ids": torch.zeros(2, 3)}, ["input_ids", "token_type_ids"])


def test_inputs_with_other_numbers_of_examples_are_refused():
    batch = {"pixel_values": torch.zeros(2, 3), "grid": torch.zeros(1, 3)}
    with pytest.raises(DataError, match=r"different numbers of examples, \{'grid': 1, 'pixel_values': 2\}"):
        keys(batch)


def test_the_name_of_an_input_matters():
    values = torch.arange(6).view(2, 3)
    assert keys({"input_ids": values}) != keys({"token_type_ids": values})
