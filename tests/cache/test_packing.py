"""Caches of packed datasets as TRL packs and collates them, and packed training on caches of other examples."""

import pytest
import torch
from tiny_models import llama
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_dis import DISConfig, DISDistillationTrainer, TeacherCache, cache_teacher_targets
from hf_dis.errors import DataError
from hf_dis.items import stored_items, token_items
from hf_dis.teacher.cached import TARGETS

datasets = pytest.importorskip("datasets")
data_utils = pytest.importorskip("trl.data_utils")
sft = pytest.importorskip("trl.trainer.sft_trainer")

C, LENGTH = 50, 16
SETTINGS = {"depth": C, "temperature": 1.0, "shard_examples": 4, "show_progress": False}
PADDED = sft.DataCollatorForLanguageModeling(pad_token_id=0)
JOINED = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


@pytest.fixture(scope="module")
def lm():
    return llama(C, seed=1, spread=30)


@pytest.fixture(scope="module")
def unpacked():
    """Sequences of 3 to 11 tokens, of which the first two are a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (20,), generator=generator).tolist()
    ids = [torch.randint(1, C, (length,), generator=generator).tolist() for length in lengths]
    sequences = [{"input_ids": tokens, "labels": [-100, -100, *tokens[2:]]} for tokens in ids]
    return datasets.Dataset.from_list(sequences)


def packed(dataset, strategy):
    return data_utils.pack_dataset(dataset, LENGTH, strategy)


def write(teacher, dataset, path, collator, **settings):
    return cache_teacher_targets(teacher, dataset, path, data_collator=collator, **SETTINGS | settings)


def answers(teacher, batch):
    """The teacher's likeliest class of each supervised token, each sequence given to it alone."""
    found = []
    for tokens, labels, starts in zip(
        batch["input_ids"], batch["labels"], batch.get("position_ids", [None] * len(batch["labels"])), strict=True
    ):
        bounds = [0] if starts is None else (starts == 0).nonzero()[:, 0].tolist()
        for first, end in zip(bounds, [*bounds[1:], len(tokens)], strict=True):
            with torch.no_grad():
                best = teacher(input_ids=tokens[None, first:end]).logits[0].argmax(1)
            found.append(best[:-1][labels[first + 1 : end] != -100])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("strategy", "collator"),
    [("bfd", JOINED), ("bfd_split", JOINED), ("wrapped", PADDED)],
    ids=["bfd", "bfd_split", "wrapped"],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_packed_examples_find_their_targets(lm, unpacked, strategy, collator, batch_size, tmp_path):
    """In any order, one by one and joined; the teacher is given each sequence of a packed example alone."""
    dataset = packed(unpacked, strategy)
    assert 1 < len(dataset) < len(unpacked)
    cache = write(lm, dataset, tmp_path, collator, batch_size=2)
    assert len(cache) == len(dataset)
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=2, collate_fn=cache.collator(collator))
    seen = 0
    for batch in loader:
        stored = stored_items(batch[TARGETS])
        assert len(stored) == len(token_items(batch["labels"], None, batch["labels"].shape, shifts_labels=True))
        ids = cache.header.layout.unpack(stored).ids[:, 0]
        assert torch.equal(ids, answers(lm, batch))
        seen += len(ids)
    assert seen == sum(shard.items for shard in cache.header.shards)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_a_packed_student_trains_on_the_cache_as_with_the_teacher(lm, unpacked, strategy, tmp_path):
    dataset, collator = packed(unpacked, strategy), PADDED if strategy == "wrapped" else JOINED
    cache = write(lm, dataset, tmp_path / "cache", collator)
    losses = []
    for given in ({"teacher_cache": cache}, {"teacher_model": llama(C, seed=1, spread=30)}):
        args = DISConfig(
            output_dir=str(tmp_path / "out"),
            temperature=1.0,
            head_mode="exact",
            per_device_train_batch_size=2,
            max_steps=4,
            logging_steps=1,
            optim="sgd",
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = DISDistillationTrainer(llama(C), args=args, train_dataset=dataset, data_collator=collator, **given)
        trainer.train()
        losses.append([log["kd_loss"] for log in trainer.state.log_history if "kd_loss" in log])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_sequences_that_are_not_packed_may_be_joined(lm, unpacked, tmp_path):
    """Targets were stored by a collator that pads; a padding-free one gives the student the same sequences."""
    cache = write(lm, unpacked, tmp_path, PADDED)
    batch = cache.collator(JOINED)([unpacked[number] for number in (7, 0, 12)])
    assert batch["input_ids"].shape[0] == 1
    ids = cache.header.layout.unpack(stored_items(batch[TARGETS])).ids[:, 0]
    assert torch.equal(ids, answers(lm, batch))


@pytest.mark.parametrize(
    ("strategy", "collator", "told"),
    [
        (
            "wrapped",
            PADDED,
            r"of 3 examples are not in the cache.*If the training packs examples: cache the packed dataset",
        ),
        ("bfd", JOINED, r"packs several sequences into one example.*cache the packed dataset"),
    ],
)
def test_a_cache_of_examples_that_are_not_packed_is_refused(lm, unpacked, strategy, collator, told, tmp_path):
    cache = write(lm, unpacked, tmp_path, PADDED)
    dataset = packed(unpacked, strategy)
    remedy = r" \(trainer.train_dataset, with data_collator=trainer.data_collator\), or set packing=False"
    with pytest.raises(DataError, match=told + remedy):
        cache.collator(collator)([dataset[number] for number in range(3)])


def test_a_cache_of_packed_examples_is_refused_for_others(lm, unpacked, tmp_path):
    cache = write(lm, packed(unpacked, "bfd"), tmp_path, JOINED)
    with pytest.raises(DataError, match=r"the batch has no position_ids"):
        cache.collator(PADDED)([unpacked[0], unpacked[1]])
    with pytest.raises(DataError, match=r"1 of 1 examples are not in the cache"):
        cache.collator(JOINED)([unpacked[0], unpacked[1]])


def test_examples_of_the_same_tokens_whose_sequences_saw_each_other_are_refused(lm, tmp_path):
    """An example of two sequences, cached as one sequence and trained on as two: tokens and labels are equal."""
    example = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, 6, 7, -100, 9, 10]}
    cache = write(lm, [example], tmp_path, PADDED)
    assert len(stored_items(cache.collator(PADDED)([example])[TARGETS])) == 4
    with pytest.raises(DataError, match="packs several sequences"):
        cache.collator(JOINED)([{**example, "seq_lengths": [3, 3]}])


def test_joined_examples_that_nothing_tells_apart_are_refused(lm, unpacked, tmp_path):
    def join(features):
        return {name: value for name, value in JOINED(features).items() if name in ("input_ids", "labels")}

    cache = write(lm, unpacked, tmp_path, join)
    assert len(cache) == len(unpacked)
    collator = cache.collator(join)
    assert collator([unpacked[3]])[TARGETS].shape[0] == 1
    with pytest.raises(DataError, match=r"joined 2 examples into one sequence without position_ids.*batch_size=1"):
        collator([unpacked[3], unpacked[4]])


def test_the_trainer_refuses_it_before_the_first_step(lm, unpacked, tmp_path):
    write(lm, unpacked, tmp_path / "cache", PADDED)
    args = DISConfig(output_dir=str(tmp_path), temperature=1.0, head_mode="exact", use_cpu=True, report_to="none")
    args.remove_unused_columns = False
    trainer = DISDistillationTrainer(
        llama(C),
        args=args,
        teacher_cache=TeacherCache(tmp_path / "cache"),
        train_dataset=packed(unpacked, "wrapped"),
        data_collator=PADDED,
    )
    with pytest.raises(DataError, match=r"examples are not in the cache.*set packing=False"):
        trainer.get_train_dataloader()


def test_images_are_told_nothing_of_packing(whole):
    with pytest.raises(DataError) as told:
        TeacherCache(whole).look_up(default_data_collator([{"pixel_values": torch.zeros(3, 8, 8)}]))
    assert "packing" not in str(told.value)
