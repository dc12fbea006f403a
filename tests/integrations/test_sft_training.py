"""Trainings of SFT: resume, evaluation, logs, adapters, streams, caches, the model card."""

import copy

import chats
import peft
import pytest
import torch
import transformers as hf
from chats import make_trainer
from divergences_by_definition import OTHERS, definition
from reference import supervised
from tiny_models import SMALL, patched_modules
from transformers import AutoModelForCausalLM

from hf_dis import cache_teacher_targets
from hf_dis.integrations.trl import DISSFTTrainer

# Sampled in earnest: by several tails, a fitted proposal, and a warm-up.
SAMPLED = {"num_tails": 2, "exact_warmup_steps": 1.0, "optim": "adamw_torch", "learning_rate": 1e-2}
PACKED = {"packing": True, "assistant_only_loss": True}
ALL = {"num_sampled_classes": 10, "num_shared_classes": chats.V}


def state(trainer):
    found = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return found | {f"sampler {name}": value for name, value in trainer.distiller.sampler.state_dict().items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("settings", [{}, PACKED], ids=["unpacked", "packed"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, settings):
    settings = {**SAMPLED, **settings, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    settings |= {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path, train_dataset=chats.chats(60), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, chats.student(seed=7), train_dataset=chats.chats(60), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 4 and differing(state(resumed), state(whole)) == []
    assert differing(state(whole), state(make_trainer(tmp_path, train_dataset=chats.chats(60), **settings)))


# Evaluation


@pytest.mark.parametrize("mode", ["sampled", "exact"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd 0.5", "skew_kl 0.1"])
def test_another_divergence_is_distilled_and_evaluated(tmp_path, name, mode):
    divergence = OTHERS[name]
    settings = {"divergence": divergence.name, "hard_label_weight": 0.0, "head_mode": mode, "max_steps": 10}
    data = chats.chats(11, seed=3)
    trainer = make_trainer(tmp_path, train_dataset=data, eval_dataset=data, optim="adamw_torch", **settings)
    before = trainer.evaluate()[f"eval_{divergence.name}"]
    trainer.train()
    metrics = trainer.evaluate()
    models = trainer.model, trainer.distiller.online_teacher.model
    found = [supervised(batch, *models)[1:] for batch in trainer.get_eval_dataloader()]
    with torch.no_grad():
        ours, theirs = (torch.cat(parts) for parts in zip(*found, strict=True))
    for key, temperature in (("eval_kd_loss", 2.0), (f"eval_{divergence.name}", 1.0)):
        expected = definition(divergence, ours, theirs, temperature).mean().item()
        assert metrics[key] == pytest.approx(expected, rel=1e-4)
    assert metrics[f"eval_{divergence.name}"] < before


@pytest.mark.parametrize("settings", [{}, PACKED, {"assistant_only_loss": True}], ids=["text", "packed", "assistant"])
def test_evaluation_is_the_exact_loss_of_all_items(tmp_path, dense_kd, dense_ce, settings):
    trainer = make_trainer(tmp_path, eval_dataset=chats.chats(11, seed=3), **settings)
    metrics = trainer.evaluate()
    found = [
        supervised(batch, trainer.model, trainer.distiller.online_teacher.model)
        for batch in trainer.get_eval_dataloader()
    ]
    labels, ours, theirs = (torch.cat(parts) for parts in zip(*found, strict=True))
    with torch.no_grad():
        kd, kl, ce = dense_kd(ours, theirs, 2.0), dense_kd(ours, theirs, 1.0), dense_ce(ours, labels)
    expected = {"loss": (0.7 * kd + 0.3 * ce), "kd_loss": kd, "kl": kl, "ce_loss": ce}
    assert {name: metrics[f"eval_{name}"] for name in expected} == {
        name: pytest.approx(float(values.mean()), rel=1e-5) for name, values in expected.items()
    }


def test_evaluation_holds_no_logits_as_a_whole(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=chats.chats(11, seed=3), **PACKED)
    trainer.evaluate()  # what is compared once is done
    widths, stream = [], trainer.distiller.student_stream
    stream.chunk_items = trainer.distiller.online_teacher.stream.chunk_items = 4
    trainer.model.lm_head.register_forward_hook(lambda head, args, logits: widths.append(tuple(logits.shape)))
    trainer.evaluate()
    assert {width for *_, width in widths} == {1, chats.V}
    assert max(rows for *_, rows, width in widths if width == chats.V) <= 4


def test_metrics_of_the_users_are_given_the_logits(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions.shape[-1], prediction.label_ids.shape))
        return {"mine": 1.0}

    trainer = make_trainer(tmp_path, eval_dataset=chats.chats(8, seed=3), compute_metrics=compute_metrics)
    assert trainer.evaluate()["eval_mine"] == 1.0
    assert seen[0][0] == chats.V and seen[0][1][0] == 8


# Logs


@pytest.mark.parametrize("settings", [{}, PACKED], ids=["unpacked", "packed"])
def test_tokens_are_counted_over_batches(tmp_path, settings):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, train_dataset=chats.chats(60), **settings)
    trainer.train()
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(6), strict=False)]
    tokens = [int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum()) for batch in batches]
    found = [log["num_tokens"] for log in trainer.state.log_history if "loss" in log]
    assert found == [sum(tokens[:2]), sum(tokens[:4]), sum(tokens)]


def test_the_entropy_is_that_of_the_student_where_all_classes_are_sampled(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, **PACKED, **ALL)
    _, logits = supervised(next(iter(trainer.get_train_dataloader())), trainer.model)
    expected = torch.distributions.Categorical(logits=logits.detach()).entropy().mean()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["entropy_estimate"] == pytest.approx(float(expected), rel=1e-5)
    assert "entropy" not in log and "mean_token_accuracy" not in log


def test_what_is_not_logged_is_told_once(tmp_path, caplog):
    from hf_dis.integrations.trl import logger

    type(logger).warning_once.cache_clear()
    for _ in range(2):
        make_trainer(tmp_path, max_steps=1).train()
    assert sum("mean_token_accuracy is not logged" in record.message for record in caplog.records) == 1


def test_exact_mode_logs_no_estimate(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, head_mode="exact")
    trainer.train()
    assert "entropy_estimate" not in trainer.state.log_history[0]


@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_the_router_loss_is_trained_and_logged(tmp_path, mode):
    config = hf.MixtralConfig(vocab_size=chats.V, num_key_value_heads=2, num_local_experts=4, **SMALL)
    gates, logs = {}, {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        student = hf.MixtralForCausalLM(config)
        trainer = make_trainer(tmp_path, student, max_steps=1, head_mode=mode, router_aux_loss_coef=weight)
        trainer.train()
        gates[weight] = torch.cat([p.flatten() for name, p in student.named_parameters() if "gate.weight" in name])
        logs[weight] = trainer.state.log_history[0]
    assert "aux_loss" not in logs[0.0] and logs[5.0]["aux_loss"] > 1
    assert logs[5.0]["loss"] == pytest.approx(logs[0.0]["loss"] + 5 * logs[5.0]["aux_loss"], rel=1e-5)
    assert not torch.allclose(gates[0.0], gates[5.0], atol=1e-5)


# Students, teachers and data of all kinds


def test_documents_stay_apart_where_a_student_keeps_keys_and_values(tmp_path, dense_kd):
    trainer = make_trainer(tmp_path, use_cache=True, max_steps=1, packing=True, **ALL)
    models = trainer.model, trainer.distiller.online_teacher.model
    _, ours, theirs = supervised(next(iter(trainer.get_train_dataloader())), *models)
    expected = dense_kd(ours.detach(), theirs, 2.0).mean()
    trainer.train()
    assert trainer.state.log_history[0]["kd_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_an_adapter_is_trained_and_saved_alone(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_config=lora, **PACKED, **SAMPLED)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora" in name} and moved
    trainer.save_model()
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


@pytest.mark.parametrize("settings", [{}, PACKED], ids=["unpacked", "packed"])
def test_a_stream_is_trained_as_the_dataset_itself(tmp_path, settings):
    losses = []
    for data in (chats.chats(40), chats.chats(40).to_iterable_dataset()):
        trainer = make_trainer(tmp_path, train_dataset=data, **settings)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1]) and len(losses[0]) == 3


def test_models_by_name(tmp_path):
    for name, model in (("student", chats.student()), ("teacher", chats.teacher())):
        model.save_pretrained(tmp_path / name)
        chats.tokenizer().save_pretrained(tmp_path / name)
    trainer = make_trainer(tmp_path, str(tmp_path / "student"), str(tmp_path / "teacher"), processing_class=None)
    trainer.train()
    here = make_trainer(tmp_path)
    here.train()
    assert differing(state(trainer), state(here)) == []


PREPARED = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True},
    "packed by cuts": {"packing": True, "packing_strategy": "wrapped"},
}


@pytest.mark.parametrize("prepared", PREPARED)
def test_a_cache_of_the_prepared_examples(tmp_path, prepared):
    settings = {"assistant_only_loss": True, **ALL, **PREPARED[prepared]}
    online = make_trainer(tmp_path, **settings)
    cache = cache_teacher_targets(
        chats.teacher(),
        online.train_dataset,
        tmp_path / "cache",
        depth=chats.V,
        data_collator=online.data_collator,
        processing_class=online.processing_class,
    )
    online.train()
    cached = make_trainer(tmp_path, teacher_model=None, teacher_cache=cache, **settings, rank_depth=None)
    cached.train()
    losses = [[log["kd_loss"] for log in one.state.log_history if "kd_loss" in log] for one in (online, cached)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and len(losses[0]) == 3


# What is left of it


def ordinary(student):
    """An instance's forward would run the original in a copy."""
    assert patched_modules(student) == []
    other, ids = copy.deepcopy(student), torch.arange(4, 9)[None]
    with torch.no_grad():
        other.lm_head.weight.zero_()
    return not other(input_ids=ids).logits.any() and bool(student(input_ids=ids).logits.any())


def test_the_student_is_an_ordinary_model(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    assert ordinary(trainer.model)
    trainer.train()
    assert ordinary(trainer.model)


def test_the_student_is_an_ordinary_model_after_an_error(tmp_path):
    student = chats.student()
    with pytest.raises(ValueError, match="there is no teacher"):
        make_trainer(tmp_path, student, None)
    with pytest.raises(ValueError, match="chat templates"):
        other = chats.tokenizer(chats.TEMPLATE.replace("<user>", "<eos>"))
        make_trainer(tmp_path, student, teacher_processing_class=other)
    assert ordinary(student)


def test_a_forward_of_the_students_own_stays(tmp_path):
    student, calls = chats.student(), []
    forward = student.forward
    student.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    own = student.forward
    make_trainer(tmp_path, student, max_steps=1).train()
    assert student.forward is own and calls


def test_checkpoints_come_with_a_card_of_the_method(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    written = (tmp_path / "out" / "README.md").read_text()
    assert "arXiv 1812.00914" in written and "- trl" in written and "- hf_dis" in written
    trainer.create_model_card(model_name="mine", dataset_name="the/chats", tags="extra")
    written = (tmp_path / "out" / "README.md").read_text()
    assert "the/chats" in written and "# mine" in written and "- extra" in written and "- sft" in written
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2").config.vocab_size == chats.V


def test_without_arguments_the_defaults_are_those_of_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = DISSFTTrainer.config_class(output_dir="out", use_cpu=True)
    assert args.bf16 and args.logging_steps == 10 and args.learning_rate == 2e-5  # SFT's
    assert args.temperature == 2.0 and args.head_mode == "auto"
