"""row_sparse_head where the head's weight is the embedding's: gradients of both uses, united, through the Trainer."""

import copy

import pytest
import torch
import transformers as hf
from tiny_models import SMALL, assert_near, bart, bert_mlm, gpt2, labelled_tokens, llama, patched_modules, t5

from hf_dis.models.ties import find_tied_embeddings

V = 50
# All classes are sampled with certainty, so every row is in every gradient, and lazy AdamW is dense AdamW.
ALL = {"num_sampled_classes": 10, "rank_depth": 10, "num_shared_classes": V}
FEW = {"num_sampled_classes": 2, "num_shared_classes": 0, "rank_depth": 2, "proposal": "topk"}
CALM = {"adam_epsilon": 1e-3, "weight_decay": 0.1}


def gemma(vocab_size, seed=0, spread=1.0):
    """Its embedding is scaled, has a padding token, and is the head's weight."""
    torch.manual_seed(seed)
    sizes = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "vocab_size": vocab_size}
    model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes))
    with torch.no_grad():
        model.lm_head.weight *= spread
    return model


BUILDS = {"GPT-2": gpt2, "Gemma-3": gemma, "BERT": bert_mlm, "T5": t5, "BART": bart}


@pytest.fixture
def make_tied_trainer(make_trainer):
    def make(build=gemma, length=6, **settings):
        data = {"train_dataset": labelled_tokens(32, V, length), "teacher": build(V, seed=1, spread=3)}
        return make_trainer(build(V), **{"row_sparse_head": True, **data, **settings})

    return make


def trained(trainer, **keywords):
    trainer.train(**keywords)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_with_all_classes_sampled_it_is_dense_adamw(make_tied_trainer, build):
    settings = {"max_grad_norm": 0.05, "logging_steps": 1, **CALM, **ALL}
    dense, sparse = (make_tied_trainer(build, row_sparse_head=flag, **settings) for flag in (False, True))
    before = copy.deepcopy(dense.model.state_dict())
    expected = trained(dense)
    assert_near(trained(sparse), expected, 2e-5)
    assert any(not torch.equal(expected[name], before[name]) for name in before)
    norms = [[log["grad_norm"] for log in one.state.log_history if "loss" in log] for one in (dense, sparse)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert patched_modules(sparse.model) == []


def test_rows_of_input_tokens_and_sampled_classes_are_stepped_and_no_other(make_tied_trainer):
    """One token at the input everywhere, so that the other rows that move are those of sampled classes."""
    item = {"input_ids": torch.full((6,), 7), "labels": torch.full((6,), 9)}
    settings = {"teacher": llama(V, seed=1, spread=30), "hard_label_weight": 0.0, **FEW}
    trainer = make_tied_trainer(gpt2, train_dataset=[item] * 8, max_steps=1, **settings)
    sampled, sample = [], trainer.distiller.sampler.sample

    def record(*args):
        sampled.append(sample(*args))
        return sampled[-1]

    trainer.distiller.sampler.sample = record
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    moved = (trainer.model.lm_head.weight != before).any(1).nonzero()[:, 0].tolist()
    classes = torch.cat([one.item_ids.flatten() for one in sampled]).unique().tolist()
    assert 7 not in classes and moved == sorted({7, *classes}) and len(moved) < 10


def test_the_gradient_is_sparse_until_the_step_and_the_embedding_is_left_alone(make_tied_trainer):
    trainer = make_tied_trainer(gemma, max_steps=2)
    seen, embedding = [], trainer.model.model.embed_tokens
    average = torch.optim.AdamW.step

    def step(optimizer, *args):
        gradient = trainer.model.lm_head.weight.grad
        seen.append((gradient.is_sparse, gradient.is_coalesced(), embedding.sparse))
        return average(optimizer, *args)

    trainer.create_optimizer()
    trainer.optimizer.step = step.__get__(trainer.optimizer)
    trainer.train()
    assert seen == [(True, True, False)] * 2
    assert patched_modules(trainer.model) == [] and not embedding.sparse


@pytest.mark.parametrize("build", [gpt2, t5], ids=["GPT-2", "T5"])
def test_accumulation_is_one_large_batch(make_tied_trainer, build):
    results = []
    for size in (8, 2):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        results.append(trained(make_tied_trainer(build, **batches, **FEW, **CALM)))
    assert_near(results[1], results[0])


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(make_tied_trainer):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, **CALM}
    whole, resumed = make_tied_trainer(**saving), make_tied_trainer(**saving)
    expected = trained(whole)
    found = trained(resumed, resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 2e-5),
        ({"bf16": True}, 5e-3),
        ({"exact_warmup_steps": 2}, 2e-5),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 2e-5),
        ({"head_learning_rate": 0.1}, 2e-5),
    ],
    ids=["gradient checkpointing", "bf16", "exact start", "torch.compile", "head rate"],
)
def test_it_trains_as_a_dense_one_with(make_tied_trainer, how, tolerance):
    dense, sparse = (make_tied_trainer(row_sparse_head=flag, **CALM, **ALL, **how) for flag in (False, True))
    before = sparse.model.lm_head.weight.detach().clone()
    assert_near(trained(sparse), trained(dense), tolerance)
    assert sparse.model.lm_head.weight is sparse.model.model.embed_tokens.weight
    assert (sparse.model.lm_head.weight - before).abs().max() > 2 * tolerance


def test_embeddings_of_a_head_are_found_where_both_are_trained():
    assert find_tied_embeddings(gpt2(V), ["lm_head"]) == ("transformer.wte",)
    assert find_tied_embeddings(gemma(V), ["lm_head"]) == ("model.embed_tokens",)
    assert find_tied_embeddings(llama(V), ["lm_head"]) == ()
    frozen = gpt2(V)
    frozen.lm_head.weight.requires_grad_(False)
    assert find_tied_embeddings(frozen, ["lm_head"]) == ()
    assert set(find_tied_embeddings(t5(V), ["lm_head"])) >= {"shared"}
