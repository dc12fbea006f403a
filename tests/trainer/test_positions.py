"""Places of a batch's items found on the host, which a step on an accelerator takes in place of looking for them."""

import pickle

import pytest
import torch
from tiny_models import assert_near, labelled_tokens, llama
from torch.utils.data import IterableDataset
from transformers import default_data_collator

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.errors import DataError
from hf_dis.items import FILLER, token_items
from hf_dis.models.tasks import Task
from hf_dis.teacher.cached import TARGETS
from hf_dis.trainer import mixin
from hf_dis.trainer.positions import POSITIONS, KnownPositions, PositionsCollator, with_positions

V = 40


def collated(collate=default_data_collator):
    return PositionsCollator(collate, Task.CAUSAL_LM)(labelled_tokens(4, V))


def with_stored(numbers):
    """A collator of batches with stored targets of as many items per example."""

    def collate(features):
        stored = torch.full((len(features), max(numbers), 8), FILLER, dtype=torch.uint8)
        for example, number in enumerate(numbers):
            stored[example, :number] = 1
        return {**default_data_collator(features), TARGETS: stored}

    return collate


def trainer_of(folder, **keywords):
    sizes = {"num_sampled_classes": 6, "num_shared_classes": 8, "rank_depth": 10, "per_device_train_batch_size": 4}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 3}
    args = DISConfig(str(folder), head_mode="sampled", **sizes, **quiet, **keywords)
    return DISDistillationTrainer(llama(V), llama(V, seed=1, spread=30), args, train_dataset=labelled_tokens(32, V))


def test_the_places_are_those_that_a_step_finds():
    batch = collated()
    labels = batch["labels"]
    assert torch.equal(batch[POSITIONS], token_items(labels, None, labels.shape, True).positions)
    assert pickle.loads(pickle.dumps(PositionsCollator(default_data_collator, Task.CAUSAL_LM))).task is Task.CAUSAL_LM


def test_a_batch_without_labels_stays_as_it_is():
    examples = [{"input_ids": item["input_ids"]} for item in labelled_tokens(4, V)]
    assert PositionsCollator(default_data_collator, Task.CAUSAL_LM)(examples).keys() == {"input_ids"}


def test_targets_of_another_number_of_items_are_told():
    assert len(collated(with_stored([5, 4, 5, 4]))[POSITIONS]) == 18
    with pytest.raises(DataError, match="holds targets of 17 items for this batch, and 18 are supervised"):
        collated(with_stored([5, 4, 5, 3]))


def test_places_are_known_as_long_as_the_labels_stay():
    batch, other = collated(), {"labels": torch.zeros(2, 3)}
    expected = batch[POSITIONS]
    known = KnownPositions([batch, other])
    assert POSITIONS not in batch and known.of(batch) is expected
    assert known.of(other) is None and known.of({}) is None and KnownPositions().of(batch) is None
    assert known.of({**batch, "labels": batch["labels"].clone()}) is None
    batch["labels"][0, 1] = -100
    assert known.of(batch) is None


class Stream(IterableDataset):
    def __iter__(self):
        yield from labelled_tokens(4, V)


def test_only_batches_of_tokens_that_go_to_an_accelerator_whole_are_given_places(tmp_path, monkeypatch):
    def found(task=Task.CAUSAL_LM, dataset=(), device="cuda", **config):
        args = DISConfig(str(tmp_path), use_cpu=True, accelerator_config=config or None)
        monkeypatch.setattr(DISConfig, "device", torch.device(device))
        collate = with_positions(default_data_collator, task, dataset, args)
        monkeypatch.undo()
        return isinstance(collate, PositionsCollator)

    assert found() and found(Task.SEQ2SEQ_LM)
    assert not found(device="cpu") and not found(Task.CLASSIFICATION) and not found(dataset=Stream())
    assert not found(dispatch_batches=True)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_with_known_places_is_the_same(tmp_path, monkeypatch, accumulation):
    expected = trainer_of(tmp_path, gradient_accumulation_steps=accumulation)
    expected.train()
    taken, own = [], KnownPositions.of
    monkeypatch.setattr(mixin, "with_positions", lambda collate, task, *args: PositionsCollator(collate, task))
    monkeypatch.setattr(KnownPositions, "of", lambda *args: taken.append(own(*args)) or taken[-1])
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=accumulation)
    trainer.train()
    assert len(taken) == 2 * 3 * accumulation and all(positions is not None for positions in taken)
    assert_near(dict(trainer.model.state_dict()), dict(expected.model.state_dict()), 0)
    assert trainer.num_items_seen == expected.num_items_seen > 0
