"""Whole steps of the Trainers on fake CUDA tensors: where the host waits for the device, and how much is launched."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from accelerator_counts import head_is_known
from datasets import Dataset
from fake_cuda import fake_cuda
from tiny_models import labelled_tokens, llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator

from hf_dis import DISConfig, DISDistillationTrainer
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.teacher.cached import TARGETS, CachedTeacher
from hf_dis.teacher.compact import TargetLayout

V, BATCH, LENGTH, WINDOW = 500, 8, 6, 2
N = BATCH * (LENGTH - 1)
SIZES = {"nonzero": N, "tolist in items.py": [N, N], "tolist": [20, 100]}
LAYOUT = TargetLayout(V, 12, 16)
SAMPLE = {"head_mode": "sampled", "num_sampled_classes": 6, "num_shared_classes": 8, "rank_depth": 10}
PRECISIONS = {"float32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
# GradScaler reads once per optimizer step if gradients overflowed.
SCALER_WAITS = {"float32": 0, "bf16": 0, "fp16": 1}


@pytest.fixture
def counts(monkeypatch):
    """The counts of what happens in a test, in which accelerate finds a CUDA device."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # else a DataLoader pins no memory
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")  # TRL asks for it
    with head_is_known("lm_head"), fake_cuda(SIZES) as counts:
        yield counts


def with_stored_targets(collate):
    def collate_both(features):
        targets = torch.empty(BATCH, LENGTH - 1, LAYOUT.item_bytes, dtype=torch.uint8)
        return {**collate(features), TARGETS: targets}

    return collate_both


def student(seed=0):
    with torch.device("cuda"):
        return llama(V, seed=seed, attn_implementation="eager")


def settings(folder, **changed):
    sizes = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": WINDOW, "max_steps": 4}
    quiet = {"output_dir": str(folder), "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch"}
    return {**sizes, **quiet, **changed}


def trainer_of(folder, targets, **changed):
    args = DISConfig(**settings(folder, **{**SAMPLE, **changed}))
    collator = with_stored_targets(default_data_collator) if targets == "cached" else default_data_collator
    dataset = labelled_tokens(64, V, LENGTH)
    return DISDistillationTrainer(student(), student(1), args, train_dataset=dataset, data_collator=collator)


def sft_trainer_of(folder, targets, **changed):
    trl = pytest.importorskip("hf_dis.integrations.trl", exc_type=ImportError)
    args = trl.DISSFTConfig(
        **settings(folder, **{**SAMPLE, "gradient_checkpointing": False, "bf16": False, **changed})
    )
    words = WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>")
    examples = [{"input_ids": item["input_ids"].tolist()} for item in labelled_tokens(64, V, LENGTH)]
    dataset = Dataset.from_list(examples)
    trainer = trl.DISSFTTrainer(student(), student(1), args, train_dataset=dataset, processing_class=tokenizer)
    if targets == "cached":
        trainer.data_collator = with_stored_targets(trainer.data_collator)
    trainer._num_tokens = torch.zeros((), dtype=torch.long, device=args.device)  # as at the start of a training
    return trainer


HOSTS = {"Trainer": trainer_of, "SFTTrainer": sft_trainer_of}


def prepared(trainer, targets):
    """The trainer after its first step: what is looked at once was looked at."""
    distiller = trainer.distiller
    distiller._head_is_checked = True
    for stream in (distiller.student_stream, distiller.online_teacher.stream):
        stream._head, stream._is_compared = stream.model.lm_head, True
    if targets == "cached":
        distiller.sampler = make_cached_sampler(LAYOUT, device="cuda")
        distiller.teacher = CachedTeacher(LAYOUT, "")
    trainer.state.global_step, trainer.args.logging_steps = 1, 500  # no log is due
    return trainer


def steps_of(trainer, counts, number=2):
    """Counts of the last of some optimizer steps, as ``Trainer.train`` makes them between two logs."""
    batches = iter(trainer.get_train_dataloader())
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    for _ in range(number):
        counts.start()
        window, num_items = trainer.get_batch_samples(batches, WINDOW, trainer.args.device)
        assert all(value.is_cuda for batch in window for value in batch.values() if isinstance(value, torch.Tensor))
        for number, batch in enumerate(window):
            trainer.accelerator.gradient_state._set_sync_gradients(number == WINDOW - 1)
            trainer.training_step(trainer.model, batch, num_items)
        trainer._clip_grad_norm(trainer.model)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1  # the sample is measured in the first step alone
    return sum(counts.launches.values()), counts.waits


CASES = [
    ("online", True, "bf16"),
    ("online", True, "fp16"),
    ("online", False, "fp16"),
    ("cached", True, "bf16"),
    ("cached", False, "float32"),
]


@pytest.mark.parametrize(("targets", "row_sparse", "precision"), CASES)
@pytest.mark.parametrize("host", HOSTS)
def test_waits(tmp_path, counts, host, targets, row_sparse, precision):
    """One per batch, for the number of distinct classes; no tensor of the processor, no pageable copy."""
    trainer = HOSTS[host](tmp_path, targets, row_sparse_head=row_sparse, **PRECISIONS[precision])
    _, waits = steps_of(prepared(trainer, targets), counts)
    assert sum(waits.values()) <= WINDOW + SCALER_WAITS[precision], waits


@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("targets", ["online", "cached"])
def test_waits_of_an_exact_step(tmp_path, counts, monkeypatch, targets, kernels):
    """None: the losses of a batch are summed. By kernels the loss is two launches per chunk of the teacher."""
    monkeypatch.setattr("hf_dis.kernels.obstacle", lambda device: None if kernels else "only torch is counted")
    trainer = trainer_of(tmp_path, targets, head_mode="exact", bf16=True)
    _, waits = steps_of(prepared(trainer, targets), counts)
    assert sum(waits.values()) == 0, waits
    passes = sum(number for place, number in counts.launches.items() if place.startswith("loss/triton_exact"))
    assert passes == kernels * WINDOW * 2


# Launches of a batch beyond those of a plain Trainer and of the teacher's forward.
LAUNCHES = {("online", True): 520, ("online", False): 510, ("cached", True): 350, ("cached", False): 345}


@pytest.mark.slow
@pytest.mark.parametrize(("targets", "row_sparse"), LAUNCHES)
def test_launches(tmp_path, counts, targets, row_sparse):
    ours, _ = steps_of(prepared(trainer_of(tmp_path, targets, row_sparse_head=row_sparse), targets), counts)
    args, dataset = TrainingArguments(**settings(tmp_path)), labelled_tokens(64, V, LENGTH)
    plain, _ = steps_of(Trainer(student(), args, train_dataset=dataset), counts)
    counts.start()
    with torch.no_grad():
        student()(input_ids=torch.empty(BATCH, LENGTH, dtype=torch.long, device="cuda"))
    teacher = sum(counts.launches.values()) * (targets == "online")
    assert (ours - plain) / WINDOW - teacher <= LAUNCHES[targets, row_sparse]


# What the counts find


def on_the_processor(loss):
    return loss + torch.ones(1)


def a_look_at_a_value(loss):
    return loss * float(loss.detach() > 0)


def a_loop(loss):
    return torch.stack([loss + number for number in range(64)]).mean()


def changed_steps(folder, counts, change):
    """Counts of steps whose loss is changed."""
    own = DISDistillationTrainer._normalise
    with mock.patch.object(DISDistillationTrainer, "_normalise", lambda *args: change(own(*args))):
        return steps_of(prepared(trainer_of(folder, "online"), "online"), counts)


def test_a_tensor_on_the_processor_is_refused(tmp_path, counts):
    with pytest.raises(RuntimeError, match="cpu"):
        changed_steps(tmp_path, counts, on_the_processor)


@pytest.mark.slow
def test_a_look_at_a_value_and_a_loop_are_counted(tmp_path, counts):
    launches, waits = changed_steps(tmp_path, counts, lambda loss: loss)
    assert sum(changed_steps(tmp_path, counts, a_look_at_a_value)[1].values()) == sum(waits.values()) + WINDOW
    assert changed_steps(tmp_path, counts, a_loop)[0] >= launches + 64 * WINDOW


def test_labels_that_an_override_changes_are_looked_at(tmp_path, counts):
    """The places that were found on the host are of other items then."""

    class Changes(DISDistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = {**inputs, "labels": inputs["labels"].clone()}
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = DISConfig(**settings(tmp_path, **SAMPLE))
    trainer = Changes(student(), student(1), args, train_dataset=labelled_tokens(64, V, LENGTH))
    _, waits = steps_of(prepared(trainer, "online"), counts)
    assert sum(waits.values()) == 2 * WINDOW and any(place.startswith("items.py") for place, _ in waits)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_batch_in_memory_that_is_not_pinned_is_told(tmp_path, counts, monkeypatch, pinned):
    monkeypatch.setattr("fake_cuda.PAGEABLE", BATCH * LENGTH)  # smaller than a batch
    trainer = prepared(trainer_of(tmp_path, "online", dataloader_pin_memory=pinned), "online")
    _, waits = steps_of(trainer, counts)
    assert any(kind == "pageable copy" for _, kind in waits) != pinned, waits
