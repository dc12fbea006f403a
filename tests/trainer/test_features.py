"""Features: what the head is given, item by item, whatever the batches; trainer and student stay as they were."""

import pytest
import torch
from tiny_models import labelled_images, resnet
from torch.utils.data import Dataset


@pytest.fixture(params=["vit", "resnet"])
def trainer(request, make_trainer):
    return make_trainer(**({} if request.param == "vit" else {"student": resnet(40)}))


@pytest.mark.parametrize("when", ["before training", "after training"])
def test_they_are_what_the_head_is_given(trainer, when):
    if when == "after training":
        trainer.train()
    items = labelled_images(19, 40, seed=3)
    features = trainer.extract_features(items)
    student = trainer.model.eval()
    with torch.no_grad():
        logits = student(torch.stack([item["pixel_values"] for item in items])).logits
    assert features.shape == (19, 16) and features.dtype == torch.float32
    torch.testing.assert_close(trainer.head.module(features), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_progress(make_trainer, capsys, disable_tqdm):
    trainer = make_trainer(disable_tqdm=disable_tqdm, per_device_eval_batch_size=2)
    trainer.extract_features(labelled_images(6, 40))
    assert ("Features: 100%" in capsys.readouterr().err) == (not disable_tqdm)


def test_the_head_is_not_computed(trainer, monkeypatch):
    monkeypatch.setattr(trainer.head.module, "forward", lambda *args: pytest.fail("the head was called"))
    trainer.extract_features(labelled_images(4, 40))


def test_labels_are_not_looked_at(trainer):
    given = []
    trainer.model.register_forward_pre_hook(lambda module, args, named: given.append(set(named)), with_kwargs=True)
    items = labelled_images(5, 40)
    without = [{"pixel_values": item["pixel_values"]} for item in items]
    unlabelled = [{**item, "labels": -1} for item in items]
    features = [trainer.extract_features(one) for one in (items, without, unlabelled)]
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])
    assert given == [{"pixel_values"}] * 3


def test_the_mode_and_the_forwards_are_left_as_they_were(trainer):
    trainer.model.train()
    before = {name: set(vars(module)) for name, module in trainer.model.named_modules()}
    trainer.extract_features(labelled_images(4, 40))
    assert trainer.model.training
    assert {name: set(vars(module)) for name, module in trainer.model.named_modules()} == before


def test_in_half_precision_they_are_widened(make_trainer):
    items = labelled_images(4, 40)
    wide, narrow = (make_trainer(bf16=bf16).extract_features(items) for bf16 in (False, True))
    assert narrow.dtype == torch.float32 and not torch.equal(narrow, wide)
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0.1)


def test_a_sequence_of_vectors_is_refused(make_trainer):
    trainer = make_trainer()
    # As a model would that has its head at every position.
    trainer.model.vit.layernorm.register_forward_hook(
        lambda module, args, output: output[:, None].expand(-1, 2, -1, -1)
    )
    with pytest.raises(
        ValueError, match=r"ViTForImageClassification is given features of shape \(4, .*one vector per example"
    ):
        trainer.extract_features(labelled_images(4, 40))


def test_examples_are_read_once(trainer):
    class Counting(Dataset):
        items, read = labelled_images(11, 40), []

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            self.read.append(index)
            return self.items[index]

    trainer.extract_features(Counting())
    assert Counting.read == list(range(11))


def test_without_a_head_it_says_how_to_name_it(make_trainer):
    trainer = make_trainer(head_mode="exact")
    trainer.distiller.head_layers = ()  # as where no layer was found, which exact distillation does without
    with pytest.raises(ValueError, match="name it with head_name"):
        trainer.extract_features(labelled_images(4, 40))
