"""Trainings of the on-policy hosts: resume, evaluation, adapters, streams, tools, the mixture of GKD."""

import chats
import own_text
import peft
import pytest
import torch
from divergences_by_definition import OTHERS, definition
from own_text import gkd_trainer, make_trainer
from reference import supervised
from tiny_models import patched_modules
from transformers import AutoModelForCausalLM

from hf_dis.integrations.on_policy import _labelled
from hf_dis.trainer.positions import PositionsCollator

# Sampled in earnest: by several tails, a fitted proposal, and a warm-up.
SAMPLED = {"num_tails": 2, "exact_warmup_steps": 1.0, "optim": "adamw_torch", "learning_rate": 1e-2}
MAKERS = {"on policy": make_trainer, "gkd": gkd_trainer}


def recorded(trainer):
    """The batches that the losses are computed on, as they come."""
    batches, compute_loss = [], trainer.compute_loss

    def wrapped(model, inputs, **arguments):
        batches.append(dict(inputs))
        return compute_loss(model, inputs, **arguments)

    trainer.compute_loss = wrapped
    return batches


def state(trainer):
    found = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return found | {f"sampler {name}": value for name, value in trainer.distiller.sampler.state_dict().items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("host", MAKERS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, host):
    settings = {**SAMPLED, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = MAKERS[host](tmp_path, **settings)
    whole.train()
    resumed = MAKERS[host](tmp_path, chats.student(seed=7), **settings)
    batches = recorded(resumed)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 4 and len(batches) == 4
    assert differing(state(resumed), state(whole)) == []
    assert differing(state(whole), state(MAKERS[host](tmp_path, **settings)))


# The items


@pytest.mark.parametrize("host", MAKERS)
def test_the_token_that_was_written_is_always_sampled(tmp_path, host):
    trainer = MAKERS[host](tmp_path, max_steps=2, **({"lmbda": 1.0} if host == "gkd" else {}))
    batches, samples, sample = recorded(trainer), [], trainer.distiller.sampler.sample
    trainer.distiller.sampler.sample = lambda *given: samples.append(sample(*given)) or samples[-1]
    trainer.train()
    assert len(samples) == len(batches) == 2
    for made, batch in zip(samples, batches, strict=True):
        labels = batch["labels"][:, 1:]
        assert made.has_label and made.certain[:, made.label_column].all()
        assert made.item_ids[:, made.label_column].tolist() == labels[labels != -100].tolist()


def test_prompts_padding_and_the_results_of_tools_are_no_items():
    written = {
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[8, 9, 10], [11, 1, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    found = _labelled(written)
    assert found["input_ids"].tolist() == [[0, 5, 8, 9, 10], [6, 7, 11, 1, 0]]
    assert found["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert found["labels"].tolist() == [[-100, -100, 8, 9, 10], [-100, -100, 11, 1, -100]]
    found = _labelled(written | {"tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])})
    assert found["labels"].tolist() == [[-100, -100, 8, -100, 10], [-100, -100, 11, 1, -100]]


@pytest.mark.parametrize("form", ["messages", "text"])
def test_prompts_become_the_same_tokens_as_messages_and_as_text(tmp_path, form):
    trainer = make_trainer(tmp_path, train_dataset=own_text.prompts(8, form), max_steps=1, shuffle_dataset=False)
    batches = recorded(trainer)
    trainer.train()
    starts = {tuple(row[:1]) for row in batches[0]["input_ids"][batches[0]["attention_mask"].bool()][None].tolist()}
    assert starts == {(chats.SPECIAL.index("<user>"),)}
    trained = make_trainer(tmp_path, train_dataset=own_text.prompts(8), max_steps=1, shuffle_dataset=False)
    trained.train()
    assert differing(state(trained), state(trainer)) == []


def test_a_stream_is_trained_as_the_dataset_itself(tmp_path):
    losses = []
    for data in (own_text.prompts(40), own_text.prompts(40).to_iterable_dataset()):
        trainer = make_trainer(tmp_path, train_dataset=data, shuffle_dataset=False, gradient_accumulation_steps=2)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1]) and len(losses[0]) == 3


# Divergences


@pytest.mark.parametrize("mode", ["sampled", "exact"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd 0.9", "skew_kl 0.1"])
def test_evaluation_is_exact_on_the_students_own_text(tmp_path, name, mode):
    divergence, settings = OTHERS[name], {"head_mode": mode, "per_device_eval_batch_size": 11}
    if name.startswith("jsd"):
        settings["beta"] = 0.9
    trainer = make_trainer(
        tmp_path, eval_dataset=own_text.prompts(11, seed=3), divergence=divergence.name, **settings, kd_temperature=2.0
    )
    batches = recorded(trainer)
    metrics = trainer.evaluate()
    models = trainer.model, trainer.distiller.online_teacher.model
    with torch.no_grad():
        _, ours, theirs = supervised(batches[0], *models)
    for key, temperature in (("eval_kd_loss", 2.0), (f"eval_{divergence.name}", 1.0)):
        expected = definition(divergence, ours, theirs, temperature).mean().item() / temperature**2
        assert metrics[key] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_loss"] == metrics["eval_kd_loss"] and "eval_completions/mean_length" in metrics


def test_training_comes_nearer_to_the_teacher(tmp_path):
    data = own_text.prompts(48)
    trainer = make_trainer(tmp_path, eval_dataset=data, max_steps=40, learning_rate=0.01, optim="adamw_torch")
    before = trainer.evaluate()["eval_reverse_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_reverse_kl"] < 0.8 * before


def test_changed_settings_reach_the_engine(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.args.kd_temperature = 3.0
    trainer.train()
    assert trainer.distiller.arguments.temperature == 3.0


# The mixture of GKD


def answers(batch):
    labels = batch["labels"]
    return [tuple(row[row != -100].tolist()) for row in labels]


def test_the_mixture_has_given_and_own_answers(tmp_path):
    given = gkd_trainer(tmp_path, lmbda=0.0, max_steps=6, gradient_accumulation_steps=2)
    mixed = gkd_trainer(tmp_path, lmbda=0.5, max_steps=6, gradient_accumulation_steps=2)
    found = []
    for trainer in (given, mixed):
        batches = recorded(trainer)
        trainer.train()
        found.append([answers(batch) for batch in batches])
    data = {tuple(row) for batch in given.get_train_dataloader() for row in answers(batch)}
    assert all(row in data for batch in found[0] for row in batch)
    is_given = [all(row in data for row in batch) for batch in found[1]]
    assert 0 < sum(is_given) < len(is_given) == 12


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_items_found_on_the_host_are_those_of_the_given_answers(tmp_path, monkeypatch, lmbda):
    """On an accelerator the collator finds the places of the items, which an own answer then has not."""
    settings, states = {"lmbda": lmbda, "max_steps": 4, "gradient_accumulation_steps": 2}, []
    of_host = "hf_dis.trainer.mixin.with_positions"
    for wraps in (False, True):
        if wraps:
            monkeypatch.setattr(of_host, lambda own, task, *_: PositionsCollator(own, task))
        trainer = gkd_trainer(tmp_path, **settings)
        trainer.train()
        states.append(state(trainer))
    assert differing(*states) == []


def test_the_teacher_answers_with_seq_kd(tmp_path):
    trainer = gkd_trainer(
        tmp_path, lmbda=0.0, seq_kd=True, max_steps=1, temperature=0.01, gradient_accumulation_steps=2
    )
    batches = recorded(trainer)
    trainer.train()
    teacher = trainer.distiller.online_teacher.model
    for batch in batches:
        labels, logits = supervised(batch, teacher)
        assert (logits.argmax(1) == labels).float().mean() > 0.9


def test_evaluation_of_gkd_is_on_the_given_answers(tmp_path):
    data = chats.chats(9, seed=3)
    trainer = gkd_trainer(tmp_path, eval_dataset=data, lmbda=1.0)
    batches = recorded(trainer)
    trainer.evaluate()
    found = [row for batch in batches for row in answers(batch)]
    ids = chats.tokenizer()
    expected = [(*ids(row["messages"][-1]["content"])["input_ids"], ids.eos_token_id) for row in data]
    assert found == expected


# What is left of it


@pytest.mark.parametrize("host", MAKERS)
def test_an_adapter_is_trained_and_saved_alone(tmp_path, host):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = MAKERS[host](tmp_path, peft_config=lora, **SAMPLED)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora" in name} and moved
    trainer.save_model(str(tmp_path / "saved"))
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


@pytest.mark.parametrize("host", MAKERS)
def test_models_by_name(tmp_path, host):
    for name, model in (("student", chats.student()), ("teacher", chats.teacher())):
        model.save_pretrained(tmp_path / name)
        chats.tokenizer().save_pretrained(tmp_path / name)
    named = {"teacher_model_name_or_path": str(tmp_path / "teacher"), "model_init_kwargs": {"dtype": "float32"}}
    states = []
    for models, settings in (((str(tmp_path / "student"), None), named), ((), {})):
        trainer = MAKERS[host](tmp_path, *models, **settings)  # seeds the numbers that the answers are sampled by
        trainer.train()
        states.append(state(trainer))
    assert differing(*states) == []


@pytest.mark.parametrize("host", MAKERS)
def test_row_sparse_heads_are_trained(tmp_path, host):
    settings = {"row_sparse_head": True, "optim": "adamw_torch", "num_updated_classes": 2, "learning_rate": 1e-3}
    trainer = MAKERS[host](tmp_path, gradient_accumulation_steps=2, max_grad_norm=1.0, **settings)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.distiller.row_sparse and not torch.equal(trainer.model.lm_head.weight, before)


@pytest.mark.parametrize("host", MAKERS)
def test_the_student_is_an_ordinary_model_with_a_card(tmp_path, host):
    trainer = MAKERS[host](tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    assert patched_modules(trainer.model) == []
    folder = trainer.args.output_dir
    saved = AutoModelForCausalLM.from_pretrained(f"{folder}/checkpoint-2")
    assert not any("teacher" in name for name in saved.state_dict()) and saved.config.vocab_size == chats.V
    with open(f"{folder}/README.md") as file:
        card = file.read()
    divergence = "reverse_kl, without the factor" if host == "on policy" else "jsd, beta 0.5, without the factor"
    assert "arXiv 1812.00914" in card and "- trl" in card and divergence in card
