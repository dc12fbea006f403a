"""The number of items for which head_mode="auto" times both modes."""

import datasets
import pytest
from tiny_models import labelled_tokens, llama

from hf_dis.autotune import HeadCosts
from hf_dis.trainer.expected import expected_items

V = 50


def texts(as_what):
    items = [{name: value.tolist() for name, value in item.items()} for item in labelled_tokens(16, V, length=6)]
    for item in items[8:]:
        for name in item:
            item[name] = item[name][:4]
    return as_what(items)


def transformed(items):
    return datasets.Dataset.from_list(items).with_transform(lambda batch: pytest.fail("the data was read"))


@pytest.mark.parametrize(
    ("as_what", "expected"),
    [(list, 8 * 5), (datasets.Dataset.from_list, 8 * 5), (transformed, None)],
    ids=["list", "dataset", "transform"],
)
def test_tokens_are_counted_by_the_first_examples(make_trainer, as_what, expected):
    trainer = make_trainer(llama(V), llama(V, seed=1), train_dataset=texts(as_what))
    assert expected_items(trainer) == expected


def test_the_items_of_a_batch_are_timed(make_trainer, monkeypatch):
    asked = []

    def measured(*args, num_items, **options):
        asked.append(num_items)
        return HeadCosts(1.0, 1.0)

    monkeypatch.setattr("hf_dis.build.measure_costs", measured)
    make_trainer(head_mode="auto")
    make_trainer(head_mode="auto", per_device_train_batch_size=5)
    make_trainer(llama(V), llama(V, seed=1), train_dataset=texts(list), head_mode="auto")
    assert asked == [8, 5, 40]
