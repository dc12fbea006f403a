"""Students with adapters through the real Trainer: trained as by exact distillation, saved, and resumed."""

import re

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import assert_near, labelled_tokens, llama, t5, vit
from transformers import LlamaForCausalLM

V = 50
# All classes are sampled with certainty, so the sampled loss is the exact one.
ALL = {"num_sampled_classes": 10, "rank_depth": 10, "num_shared_classes": V, "head_mode": "sampled"}
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
ADAPTERS = {
    "body": {"target_modules": ["q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


def adapted(model, **config):
    """The same adapter each time, and not the zero that PEFT starts with."""
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def student(kind="head", **config):
    return adapted(llama(V, spread=3), **ADAPTERS[kind], **config)


@pytest.fixture
def make_text_trainer(make_trainer):
    def make(model, **settings):
        given = {"train_dataset": labelled_tokens(32, V), "teacher": llama(V, seed=1, spread=30), **settings}
        return make_trainer(model, **given)

    return make


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trained(trainer, **keywords):
    trainer.train(**keywords)
    return parameters(trainer.model)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_trained_as_by_exact_distillation(make_text_trainer, kind):
    sampled, exact = (
        trained(make_text_trainer(student(kind), **SGD, **mode)) for mode in (ALL, {"head_mode": "exact"})
    )
    assert_near(sampled, exact, tolerance=2e-5)
    before = parameters(student(kind))
    moved = {name for name in before if not torch.equal(before[name], sampled[name])}
    assert moved == {name for name, parameter in student(kind).named_parameters() if parameter.requires_grad}


def test_an_encoder_decoder_with_an_adapter_on_its_tied_head(make_text_trainer):
    results = []
    for mode in (ALL, {"head_mode": "exact"}):
        model = adapted(t5(V, spread=3), target_modules=["q", "lm_head"])
        results.append(trained(make_text_trainer(model, teacher=t5(V, seed=1, spread=3), **SGD, **mode)))
    assert_near(*results, tolerance=2e-5)


def test_a_classifier_with_its_head_to_save(make_trainer):
    results = []
    for mode in ({**ALL, "num_shared_classes": 40}, {"head_mode": "exact"}):
        model = adapted(vit(40), target_modules=["q_proj"], modules_to_save=["classifier"])
        results.append(trained(make_trainer(model, **SGD, **mode)))
    assert_near(*results, tolerance=2e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_adapter_is_saved_alone_and_answers_as_the_student_did(make_text_trainer, tmp_path, kind):
    trainer = make_text_trainer(student(kind), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= saved and "model.safetensors" not in saved
    again = peft.PeftModel.from_pretrained(llama(V, spread=3), tmp_path / "adapter").eval()
    ids = torch.arange(6)[None]
    torch.testing.assert_close(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_the_card_says_how_to_load_the_adapter(make_text_trainer, tmp_path, monkeypatch):
    llama(V, spread=3).save_pretrained(tmp_path / "base")
    trainer = make_text_trainer(adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), **ADAPTERS["body"]))
    trainer.save_model()
    trainer.create_model_card(model_name="out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and "an adapter for PEFT" in card.text
    lines = re.search("```python\n(.+?)```", card.text, re.DOTALL)[1]
    assert str(tmp_path) not in card.content and '"base (a local directory)"' in lines
    monkeypatch.chdir(tmp_path)
    loaded = {}
    exec(lines.replace(" (a local directory)", ""), loaded)
    ids = torch.arange(6)[None]
    answers = [model.eval()(input_ids=ids).logits for model in (loaded["student"], trainer.model)]
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_resumed_run_is_the_uninterrupted_one(make_text_trainer, tmp_path, kind):
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = trained(make_text_trainer(student(kind), **settings))
    resumed = make_text_trainer(student(kind), **settings)
    found = trained(resumed, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_near(found, whole, 0)


def test_evaluation_and_generation_use_the_whole_head(make_text_trainer):
    model = student("modules_to_save")
    trainer = make_text_trainer(model, eval_dataset=labelled_tokens(8, V), max_steps=30, learning_rate=3e-2)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.7 * before
    assert trainer.model.generate(input_ids=torch.arange(3, 6)[None], max_new_tokens=3).shape == (1, 6)


def test_a_teacher_with_an_adapter_answers_as_one_with_it_merged(make_text_trainer, caplog):
    teacher = adapted(llama(V, seed=1, spread=30), target_modules=["q_proj", "lm_head"])
    results = [
        trained(make_text_trainer(student(), teacher=one, **SGD)) for one in (teacher, teacher.merge_and_unload())
    ]
    assert_near(*results, tolerance=2e-5)
    assert "cannot be split" not in caplog.text


@pytest.mark.parametrize(("kind", "in_top"), [("head", "lora_B"), ("modules_to_save", "modules_to_save")])
def test_the_trainable_part_of_the_head_has_its_learning_rate(make_text_trainer, kind, in_top):
    trainer = make_text_trainer(student(kind), head_learning_rate=0.5)
    trainer.create_optimizer()
    fast = {id(p) for group in trainer.optimizer.param_groups if group["lr"] == 0.5 for p in group["params"]}
    named = dict(trainer.model.named_parameters())
    assert [name for name, parameter in named.items() if id(parameter) in fast] == [
        name for name in named if "lm_head" in name and in_top in name
    ]


@pytest.mark.parametrize("kind", ["modules_to_save", "head"])
def test_a_row_sparse_head_is_trained_as_a_dense_one_where_all_classes_are_sampled(make_text_trainer, kind):
    calm = {"adam_epsilon": 1e-3, **ALL}
    dense, sparse = (trained(make_text_trainer(student(kind), row_sparse_head=flag, **calm)) for flag in (False, True))
    assert_near(sparse, dense, tolerance=2e-5)


def test_an_adapter_on_a_tied_head_may_be_row_sparse(make_text_trainer):
    """The tied weight is frozen, and so needs no dense gradient."""
    model = adapted(t5(V, spread=3), target_modules=["q", "lm_head"])
    make_text_trainer(model, teacher=t5(V, seed=1, spread=3), row_sparse_head=True, **ALL).train()


def test_a_probe_of_a_head_with_an_adapter_is_refused(make_text_trainer):
    with pytest.raises(ValueError, match=r"probe_steps is 2, but .*lm_head.base_layer and .*lm_head.lora_B.default"):
        make_text_trainer(student(), probe_steps=2)
    make_text_trainer(student("body"), probe_steps=2).train()
