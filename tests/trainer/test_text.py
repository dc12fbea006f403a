"""Token models through the real Trainer: supervised positions, losses, normalisation, vocabularies."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers as hf
from tiny_models import (
    SMALL,
    bart,
    bert_mlm,
    bert_sequences,
    bert_tokens,
    gpt2,
    gpt2_sequences,
    labelled_images,
    labelled_tokens,
    llama,
    llama_sequences,
    patched_modules,
    t5,
    vit,
)
from tokenizers import Tokenizer, models

from hf_dis.models.tasks import Task

V = 50
CAUSAL, MASKED = {"llama": llama, "gpt2": gpt2}, {"bert": bert_mlm, "bert_tokens": bert_tokens}
SEQ2SEQ = {"t5": t5, "bart": bart}
TOKEN_MODELS = CAUSAL | MASKED | SEQ2SEQ
# All classes are sampled with certainty, so the sampled loss is the exact one.
ALL = {"num_sampled_classes": 10, "rank_depth": 10, "num_shared_classes": V, "head_mode": "sampled"}
SGD = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
}


def pair(build):
    return build(V, seed=0), build(V, seed=1, spread=30)


def data(num_items=32, length=6, ignored=0.3):
    """Items of tokens of which some are not supervised."""
    items = labelled_tokens(num_items, V, length)
    generator = torch.Generator().manual_seed(3)
    for item in items:
        item["labels"][torch.rand(length, generator=generator) < ignored] = -100
    return items


def parameters(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_sampling_all_classes_is_exact_distillation(make_trainer, name):
    trained = []
    for settings in (ALL, {"head_mode": "exact"}):
        student, teacher = pair(TOKEN_MODELS[name])
        trainer = make_trainer(student, teacher, train_dataset=data(), **SGD, **settings)
        trainer.train()
        trained.append(parameters(trainer))
    assert not torch.equal(trained[0], parameters(make_trainer(*pair(TOKEN_MODELS[name]), train_dataset=data())))
    torch.testing.assert_close(*trained, rtol=0, atol=2e-5)


@pytest.mark.parametrize("build", [bert_sequences, llama_sequences, gpt2_sequences])
def test_sequence_classifiers(make_trainer, build):
    items = [{**item, "labels": index % V} for index, item in enumerate(labelled_tokens(32, V))]
    trained = []
    for settings in (ALL, {"head_mode": "exact"}):
        trainer = make_trainer(*pair(build), train_dataset=items, **SGD, **settings)
        assert trainer.distiller.task is Task.CLASSIFICATION
        trainer.train()
        trained.append(parameters(trainer))
    torch.testing.assert_close(*trained, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_accumulation_changes_nothing(make_trainer, name):
    """Micro-batches of unequal numbers of supervised tokens."""
    trained = []
    for batch in ({"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2}):
        batch["gradient_accumulation_steps"] = 8 // batch["per_device_train_batch_size"]
        trainer = make_trainer(*pair(TOKEN_MODELS[name]), train_dataset=data(), **batch, **SGD, **ALL)
        trainer.train()
        trained.append(parameters(trainer))
    torch.testing.assert_close(*trained, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_evaluation_is_the_dense_mean_over_supervised_tokens(make_trainer, dense_kd, dense_ce, name):
    student, teacher = pair(TOKEN_MODELS[name])
    items = data(20)  # in batches of 8: the last one is smaller
    trainer = make_trainer(student, teacher, train_dataset=items, eval_dataset=items)
    metrics = trainer.evaluate()
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    labels = batch.pop("labels")
    if trainer.distiller.task is Task.SEQ2SEQ_LM:
        batch["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(labels=labels)
    logits, target = student.eval()(**batch).logits, teacher.eval()(**batch).logits
    if trainer.distiller.task is Task.CAUSAL_LM:
        logits, target, labels = logits[:, :-1], target[:, :-1], labels[:, 1:]
    kept = labels != -100
    ce, kd = dense_ce(logits[kept], labels[kept]).mean(), dense_kd(logits[kept], target[kept], 2.0).mean()
    assert metrics["eval_ce_loss"] == pytest.approx(ce.item(), rel=1e-5)
    assert metrics["eval_kd_loss"] == pytest.approx(kd.item(), rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(dense_kd(logits[kept], target[kept], 1.0).mean().item(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx((0.9 * kd + 0.1 * ce).item(), rel=1e-5)


def test_predictions_are_of_all_classes_and_tokens(make_trainer):
    trainer = make_trainer(*pair(llama), train_dataset=data())
    trainer.train()
    output = trainer.predict(data(9))
    assert output.predictions.shape == (9, 6, V) and output.label_ids.shape == (9, 6)
    assert not patched_modules(trainer.model)


def test_the_layout_of_language_models(make_trainer):
    layout = dict.fromkeys(("num_sampled_classes", "num_shared_classes", "num_tails", "rank_depth"))
    sampler = make_trainer(llama(5000), llama(5000, seed=1), train_dataset=data(), **layout).distiller.sampler
    assert (sampler.num_sampled, sampler.rank_depth, sampler.num_shared, sampler.num_tails) == (16, 16, 1024, 16)
    deeper = make_trainer(
        llama(5000), llama(5000), train_dataset=data(), **{**layout, "num_shared_classes": 0}
    ).distiller.sampler
    assert (deeper.num_sampled, deeper.rank_depth, deeper.num_shared) == (16, 32, 0)
    sampler = make_trainer(vit(600), vit(600), train_dataset=labelled_images(8, 600), **layout).distiller.sampler
    assert (sampler.num_sampled, sampler.rank_depth, sampler.num_shared, sampler.num_tails) == (96, 96, 416, 16)


def test_only_supervised_tokens_reach_the_head(make_trainer):
    items = data()
    trainer = make_trainer(*pair(llama), train_dataset=items, max_steps=1, per_device_train_batch_size=32)
    seen = []
    compute_loss = trainer.compute_loss

    def spy(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = compute_loss(model, inputs, True, num_items_in_batch)
        seen.append((outputs.logits.shape, int(num_items_in_batch)))
        return loss

    trainer.compute_loss = spy
    trainer.train()
    supervised = sum(int((item["labels"][1:] != -100).sum()) for item in items)
    columns = trainer.distiller.sampler.columns + 1  # and the label's
    assert seen == [((supervised, columns), supervised)]


@pytest.mark.parametrize("mode", ["sampled", "exact"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_batch_without_supervised_tokens_adds_nothing(make_trainer, name, mode):
    items = data(16)
    for item in items[8:]:
        item["labels"][:] = -100
    trainer = make_trainer(
        *pair(TOKEN_MODELS[name]),
        train_dataset=items,
        max_steps=2,
        head_mode=mode,
        train_sampling_strategy="sequential",
        **SGD,
    )
    steps = []
    trainer.add_callback(Recorder(lambda: steps.append(parameters(trainer))))
    trainer.train()
    assert torch.equal(steps[0], steps[1]) and steps[0].isfinite().all()
    state = trainer.distiller.sampler.state_dict()
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


class Recorder(hf.TrainerCallback):
    def __init__(self, record):
        self.record = record

    def on_step_end(self, *args, **kwargs):
        self.record()


@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_no_supervised_token_at_all(make_trainer, mode):
    items = data()
    for item in items:
        item["labels"][1:] = -100  # the first counts for nothing
    with pytest.raises(ValueError, match=r"no token of the training data is supervised.*-100.*collator"):
        make_trainer(*pair(llama), train_dataset=items, head_mode=mode).train()


def test_sequences_of_length_one(make_trainer):
    with pytest.raises(ValueError, match="length 1"):
        make_trainer(*pair(llama), train_dataset=labelled_tokens(16, V, 1)).train()


def test_without_labels(make_trainer):
    items = [{name: value for name, value in item.items() if name != "labels"} for item in data()]
    trainer = make_trainer(*pair(llama), train_dataset=items, eval_dataset=items)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_kd_loss"] > 0 and "eval_ce_loss" not in metrics


def tokenizer(num_tokens):
    vocabulary = {f"token{index}": index for index in range(num_tokens)}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="token0")), pad_token="token0"
    )


@pytest.mark.parametrize("widths", [(V, V + 14), (V + 14, V)])
def test_vocabularies_that_are_padded_differently(make_trainer, dense_kd, widths):
    """Trained on the shared ids as if the longer vocabulary were cut there."""
    trained = []
    for settings in (ALL, {"head_mode": "exact"}):
        student, teacher = llama(widths[0]), llama(widths[1], seed=1, spread=30)
        tokenizers = {"processing_class": tokenizer(40), "teacher_processing_class": tokenizer(40)}
        trainer = make_trainer(
            student,
            teacher,
            train_dataset=labelled_tokens(32, 40),
            eval_dataset=labelled_tokens(8, 40),
            **tokenizers,
            **SGD,
            **settings,
        )
        assert trainer.distiller.num_classes == V
        trainer.train()
        trained.append(parameters(trainer))
    torch.testing.assert_close(*trained, rtol=0, atol=2e-5)
    batch = {
        name: torch.stack([item[name] for item in labelled_tokens(8, 40)])
        for name in ("input_ids", "attention_mask", "labels")
    }
    kept = batch.pop("labels")[:, 1:] != -100
    logits, target = (model.eval()(**batch).logits[:, :-1, :V][kept] for model in (trainer.model, teacher))
    assert trainer.evaluate()["eval_kd_loss"] == pytest.approx(dense_kd(logits, target, 2.0).mean().item(), rel=1e-4)


def test_labels_that_the_teacher_does_not_know(make_trainer):
    items = labelled_tokens(16, V + 10)
    items[3]["labels"][2] = V + 5
    tokenizers = {"processing_class": tokenizer(V + 10), "teacher_processing_class": tokenizer(V)}
    trainer = make_trainer(llama(V + 10), llama(V), train_dataset=items, per_device_train_batch_size=16, **tokenizers)
    with pytest.raises(ValueError, match=rf"labels .*{V + 5}.* outside 0..{V - 1}: .*share {V} classes.*tokenizer"):
        trainer.train()


def mixtral_config(**keywords):
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    return hf.MixtralConfig(vocab_size=V, **experts, **SMALL, **keywords)


@pytest.mark.parametrize("mode", ["sampled", "exact"])
def test_the_router_loss_of_a_mixture_of_experts_is_kept(make_trainer, mode):
    gates = {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        student = hf.MixtralForCausalLM(mixtral_config(router_aux_loss_coef=weight))
        trainer = make_trainer(student, llama(V, seed=1), train_dataset=data(), max_steps=1, head_mode=mode, **SGD)
        trainer.train()
        gates[weight] = torch.cat([p.flatten() for name, p in student.named_parameters() if "gate.weight" in name])
    assert not torch.allclose(gates[0.0], gates[5.0], atol=1e-5)


class NestedConfig(hf.PreTrainedConfig):
    """The configuration of a model that reads more than text: that of its text model is a part."""

    sub_configs: ClassVar = {"text_config": hf.MixtralConfig}

    def __init__(self, text_config=None, **kwargs):
        self.text_config = text_config
        super().__init__(**kwargs)


def test_the_router_loss_is_weighed_by_the_configuration_of_the_text_model(make_trainer):
    student = hf.MixtralForCausalLM(mixtral_config(router_aux_loss_coef=5.0))
    trainer = make_trainer(student, llama(V, seed=1), train_dataset=data())
    student.config = NestedConfig(text_config=student.config)
    assert not hasattr(student.config, "router_aux_loss_coef")
    losses, outputs = torch.tensor([1.0, 2.0]), SimpleNamespace(aux_loss=torch.tensor(3.0))
    found, terms = trainer.distiller.with_router_loss(losses, {}, outputs)
    assert found.tolist() == [16, 17] and terms == {"aux_loss": 3}
    assert trainer.distiller.with_router_loss(losses, {}, SimpleNamespace(aux_loss=None)) == (losses, {})


def test_resume_repeats_the_uninterrupted_run(make_trainer, tmp_path):
    settings = {"train_dataset": data(), "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(*pair(gpt2), **settings)
    whole.train()
    resumed = make_trainer(*pair(gpt2), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert torch.equal(parameters(whole), parameters(resumed))


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_a_probe_finds_the_sampled_gradient_exact_where_all_classes_are_sampled(make_trainer, name):
    student, teacher = (TOKEN_MODELS[name](V, seed=seed, spread=5) for seed in range(2))  # with biases
    trainer = make_trainer(
        student, teacher, train_dataset=data(), probe_steps=1, logging_steps=1, max_steps=1, **SGD, **ALL
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["probe/relative_error"] < 1e-4
    assert log["probe/exact_kd_loss"] == pytest.approx(log["kd_loss"], rel=1e-4)


def test_a_probe_of_a_head_before_the_pooling_is_refused(make_trainer):
    items = [{**item, "labels": index % V} for index, item in enumerate(labelled_tokens(8, V))]
    trainer = make_trainer(*pair(gpt2_sequences), train_dataset=items, probe_steps=1, **ALL)
    with pytest.raises(
        ValueError, match="probe_steps is 1, but GPT2ForSequenceClassification computes its logits from more"
    ):
        trainer.train()
