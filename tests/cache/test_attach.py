"""Distilling from a cache through the real Trainer."""

from pathlib import Path

import pytest
import torch
from tiny_models import labelled_images, labelled_tokens, llama, vit
from transformers import default_data_collator, set_seed

from hf_dis import DISConfig, DISDistillationTrainer, cache_teacher_targets
from hf_dis.errors import DataError

C = 40
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def write(teacher, data, path, **settings):
    settings = {"depth": C, "sample_size": 0, "batch_size": 8, "show_progress": False, **settings}
    return cache_teacher_targets(teacher, data, path, **settings)


@pytest.fixture
def cache(tmp_path):
    return write(vit(C, seed=1, spread=30), labelled_images(32, C), tmp_path / "cache")


@pytest.fixture
def make(tmp_path):
    def make(cache, student=None, teacher=None, **keywords):
        given = {name: keywords.pop(name) for name in list(keywords) if name not in DISConfig.__dataclass_fields__}
        given.setdefault("train_dataset", labelled_images(32, C))
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "head_mode": "exact",
            "logging_steps": 1,
            **QUIET,
        }
        args = DISConfig(**settings | keywords)
        student = vit(C) if student is None else student
        return DISDistillationTrainer(student, teacher, args, teacher_cache=cache, **given)

    return make


def parameters(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def test_an_exact_warm_up_is_the_exact_head(make, tmp_path):
    cache = write(vit(C, seed=1, spread=30), labelled_images(32, C), tmp_path / "small", depth=6, sample_size=8)
    warm = make(cache, head_mode="sampled", exact_warmup_steps=6, adam_epsilon=1e-3)
    exact = make(cache, adam_epsilon=1e-3)
    for trainer in (warm, exact):
        trainer.train()
    assert logged(warm, "kd_loss") == pytest.approx(logged(exact, "kd_loss"), rel=1e-4)
    torch.testing.assert_close(parameters(warm), parameters(exact), rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", [{"head_mode": "exact"}, {"head_mode": "sampled", "num_sampled_classes": 5}])
def test_with_every_class_stored_it_is_the_teacher_that_is_there(make, cache, mode):
    # Nothing is left to sample, so but for log-probabilities in half precision the runs are one.
    stored = make(cache, optim="sgd", **mode)
    online = make(None, teacher=vit(C, seed=1, spread=30), optim="sgd")
    for trainer in (stored, online):
        trainer.train()
    assert logged(stored, "kd_loss") == pytest.approx(logged(online, "kd_loss"), abs=3e-3)
    moved = (parameters(online) - parameters(make(cache))).norm()
    assert (parameters(stored) - parameters(online)).norm() < 5e-3 * moved


@pytest.mark.parametrize("shared", [0, 8])
def test_sampled_classes_train_towards_the_teacher(make, tmp_path, shared):
    cache = write(vit(C, seed=1, spread=30), labelled_images(32, C), tmp_path / "small", depth=6, sample_size=8)
    trainer = make(
        cache,
        eval_teacher_cache=cache,
        eval_dataset=labelled_images(32, C),
        head_mode="sampled",
        num_sampled_classes=5,
        num_shared_classes=shared,
        max_steps=40,
    )
    before = trainer.evaluate()["eval_kd_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_kd_loss"] < 0.7 * before
    assert {"dis/ess", "dis/coverage", "dis/certain"} <= trainer.state.log_history[3].keys()


@pytest.mark.parametrize(
    "given",
    [
        {"dataloader_num_workers": 2},
        {"remove_unused_columns": False},
        {"data_collator": lambda items: default_data_collator(items[::-1])},
    ],
)
def test_each_item_gets_its_own_target(make, cache, given):
    trainer = make(cache, eval_dataset=labelled_images(32, C), **given)
    teacher = vit(C, seed=1, spread=30).eval()
    seen = 0
    for batch in trainer.get_train_dataloader():
        ids = cache.header.layout.unpack(batch["teacher_targets"][:, 0]).ids
        with torch.no_grad():
            assert torch.equal(ids[:, 0], teacher(batch["pixel_values"]).logits.argmax(1))
        seen += len(ids)
    assert seen == 32


def test_by_length_with_padding(make, tmp_path):
    items = labelled_tokens(24, 50, length=12)
    for number, item in enumerate(items):
        for name in item:
            item[name] = item[name][: 3 + number % 9]

    def pad(features):
        length = max(len(item["input_ids"]) for item in features)
        filler = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {
            name: torch.stack(
                [torch.nn.functional.pad(item[name], (0, length - len(item[name])), value=fill) for item in features]
            )
            for name, fill in filler.items()
        }

    for item in items:
        item["attention_mask"] = torch.ones_like(item["input_ids"])
    teacher = llama(50, seed=1, spread=30)
    cache = write(teacher, items, tmp_path / "cache", data_collator=pad, depth=50, batch_size=5)
    settings = {
        "train_dataset": items,
        "data_collator": pad,
        "train_sampling_strategy": "group_by_length",
        "max_steps": 4,
        "optim": "sgd",
    }
    stored, online = make(cache, llama(50), **settings), make(None, llama(50), teacher, **settings)
    for trainer in (stored, online):
        set_seed(0)
        trainer.train()
    assert logged(stored, "kd_loss") == pytest.approx(logged(online, "kd_loss"), rel=5e-3)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_a_stream_whose_examples_have_unlike_numbers_of_items(make, tmp_path):
    items = labelled_tokens(16, 50)
    for number, item in enumerate(items):
        item["labels"][: number % 6] = -100
    cache = write(llama(50, seed=1, spread=30), items, tmp_path / "cache", depth=50)
    streamed = make(cache, llama(50), train_dataset=Stream(items), max_steps=2)
    streamed.train()
    online = make(None, llama(50), llama(50, seed=1, spread=30), train_dataset=Stream(items), max_steps=2)
    online.train()
    assert logged(streamed, "kd_loss") == pytest.approx(logged(online, "kd_loss"), rel=5e-3)


def test_evaluation_reports_what_can_be_computed(make, cache):
    data = labelled_images(16, C, seed=5)
    metrics = make(cache, eval_dataset=data).evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce_loss"])
    assert not {"eval_kd_loss", "eval_kl"} & metrics.keys()
    metrics = make(cache, teacher=vit(C, seed=1, spread=30), eval_dataset=data).evaluate()
    assert {"eval_kd_loss", "eval_kl", "eval_ce_loss"} <= metrics.keys()


def test_evaluation_from_a_cache_is_that_of_its_teacher(make, cache, tmp_path):
    teacher, data = vit(C, seed=1, spread=30), labelled_images(16, C, seed=5)
    for temperature in (1.0, 2.0):
        folders = tmp_path / f"train-{temperature}", tmp_path / f"eval-{temperature}"
        train = write(teacher, labelled_images(32, C), folders[0], temperature=temperature)
        stored = write(teacher, data, folders[1], temperature=temperature)
        settings = {"temperature": temperature, "eval_dataset": data}
        found = make(train, eval_teacher_cache=stored, **settings).evaluate()
        expected = make(train, teacher=teacher, **settings).evaluate()
        assert found["eval_kd_loss"] == pytest.approx(expected["eval_kd_loss"], abs=2e-3)
        assert ("eval_kl" in found) == (temperature == 1)


def test_nothing_to_evaluate_with(make, cache):
    unlabelled = [{"pixel_values": item["pixel_values"]} for item in labelled_images(8, C)]
    with pytest.raises(ValueError, match=r"nothing to evaluate.*eval_teacher_cache"):
        make(cache, eval_dataset=unlabelled).evaluate()


def test_what_does_not_fit_is_told_all_at_once(make, tmp_path):
    names = {number: f"class {number}" for number in range(C)}
    cache = write(vit(C, id2label=names), labelled_images(8, C), tmp_path / "cache")
    others = {number: f"other {number}" for number in range(C + 1)}
    with pytest.raises(
        ValueError,
        match=r"does not fit. num_classes: the cache has 40, the student 41; temperature: the "
        r"cache has 2, the training 3; label names",
    ):
        make(cache, vit(C + 1, id2label=others), temperature=3.0)
    make(cache, vit(C))  # a student whose classes have no names


def test_another_dataset_is_refused_before_it_is_trained_on(make, cache):
    other = labelled_images(31, C) + labelled_images(1, C, seed=7)
    with pytest.raises(DataError, match="1 of 16 examples are not in the cache"):
        make(cache, train_dataset=other).train()


def test_a_subset_in_another_order_is_the_same_data(make, cache):
    make(cache, train_dataset=labelled_images(32, C)[20:4:-1]).train()


def test_labels_masked_otherwise_are_refused(make, tmp_path):
    items = labelled_tokens(8, 50)
    cache = write(llama(50, seed=1), items, tmp_path / "cache", depth=50)
    for item in items:
        item["labels"] = item["labels"].clone()
        item["labels"][:3] = -100
    with pytest.raises(DataError, match="not in the cache"):
        make(cache, llama(50), train_dataset=items).train()


def test_a_path_will_do_and_damage_is_seen(make, cache):
    make(str(cache.path), max_steps=1).train()
    shard = cache.path / cache.header.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="damaged"):
        make(str(cache.path))


def test_targets_that_no_teacher_gave_are_refused(make, cache):
    """In training and in evaluation: class ids beyond C, as 40 classes take 6 bits; probabilities with a wrong sum."""
    trainer = make(cache, eval_teacher_cache=cache, eval_dataset=labelled_images(32, C))
    layout, look_up = cache.header.layout, cache.look_up

    def altered(place, byte):
        def changed(batch):
            found = look_up(batch)
            found[..., place] = byte
            return found

        return changed

    for place, byte in ((0, 0xFF), (layout.id_bytes + 1, 0), (-1, 0x7F)):
        trainer.teacher_cache.look_up = altered(place, byte)
        for run in (trainer.train, trainer.evaluate):
            with pytest.raises(DataError, match=r"8 of 8 stored items do not fit 40 classes.*write it again"):
                run()


def test_probes_need_a_teacher(make, cache):
    with pytest.raises(ValueError, match=r"probe_steps is 5.*teacher_model too"):
        make(cache, probe_steps=5)
    make(cache, teacher=vit(C, seed=1, spread=30), probe_steps=1, head_mode="sampled", max_steps=2).train()


def test_the_card_names_the_stored_teacher(make, cache):
    trainer = make(cache, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert "ViTForImageClassification, by its stored targets" in card
    assert "40 ranked classes and 0 of the tail (systematic)" in card


def test_it_resumes_to_the_bit(make, cache):
    settings = {"head_mode": "sampled", "num_sampled_classes": 5, "save_strategy": "steps", "save_steps": 3}
    whole = make(cache, **settings)
    whole.train()
    resumed = make(cache, **settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert torch.equal(parameters(whole), parameters(resumed))
