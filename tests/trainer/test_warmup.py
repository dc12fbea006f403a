"""The exact start of a sampled training: all classes, and a sampler that learns meanwhile."""

import pytest
import torch
from tiny_models import assert_near, bart, gpt2_sequences, labelled_tokens, llama, resnet, vit

V = 50
CALM = {"adam_epsilon": 1e-3, "weight_decay": 0.1}  # Adam turns noise into steps where the gradient is small
LAYOUTS = {"strata": {}, "tails": {"num_tails": 3}, "per item": {"num_shared_classes": 0, "num_sampled_classes": 3}}
TEXTS = {"llama": llama, "bart": bart, "heads before pooling": gpt2_sequences}


def trained(trainer):
    trainer.train()
    return trainer.model.state_dict()


def touched(trainer):
    """Notes, before each optimizer step, how many rows of the head have a gradient."""
    counts, clip = [], trainer._clip_grad_norm

    def count(model):
        gradient = trainer.head.module.weight.grad
        counts.append(int(gradient.to_dense().any(1).sum()))
        return clip(model)

    trainer._clip_grad_norm = count
    return counts


@pytest.mark.parametrize("row_sparse_head", [False, True], ids=["dense", "row-sparse"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("build", [vit, resnet])
def test_a_warm_up_without_end_is_exact_distillation(make_trainer, build, layout, row_sparse_head):
    settings = {"logging_steps": 1, "head_learning_rate": 3e-2, **CALM}
    exact = make_trainer(build(40), head_mode="exact", **settings)
    warm = make_trainer(build(40), exact_warmup_steps=4, row_sparse_head=row_sparse_head, **settings, **layout)
    assert_near(trained(warm), trained(exact), tolerance=2e-6)
    for name in ("loss", "kd_loss", "ce_loss", "grad_norm"):
        values = [[log[name] for log in one.state.log_history if name in log] for one in (warm, exact)]
        assert len(values[0]) == 4 and values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("build", TEXTS.values(), ids=TEXTS)
def test_of_text_too(make_trainer, build):
    items = labelled_tokens(32, V)
    if build is gpt2_sequences:
        items = [{"input_ids": item["input_ids"], "labels": int(item["labels"][0]) % V} for item in items]
    else:
        for item in items[::3]:
            item["labels"][2:4] = -100
    settings = {"train_dataset": items, "gradient_accumulation_steps": 2, "max_steps": 2, **CALM}
    runs = [
        make_trainer(build(V, seed=0), build(V, seed=1, spread=30), **settings, **mode)
        for mode in ({"exact_warmup_steps": 2}, {"head_mode": "exact"})
    ]
    assert_near(trained(runs[0]), trained(runs[1]), tolerance=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_sampler_learns_as_if_it_had_sampled(make_trainer, layout):
    """At the first step the student is the same either way, and so are the classes sampled and what they tell."""
    states = []
    for warm_up in (0, 1):
        trainer = make_trainer(max_steps=1, exact_warmup_steps=warm_up, **layout)
        before = {name: value.clone() for name, value in trainer.distiller.sampler.state_dict().items()}
        trainer.train()
        states.append(trainer.distiller.sampler.state_dict())
    assert not torch.equal(states[0]["rank_weights"], before["rank_weights"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-9, msg=name)


@pytest.mark.parametrize("warm_up", [2, 0.3], ids=["steps", "share"])
@pytest.mark.parametrize("row_sparse_head", [False, True], ids=["dense", "row-sparse"])
def test_it_ends(make_trainer, row_sparse_head, warm_up):
    """Classes are sampled from the step on that follows, with the moments that the head has by then."""
    trainer = make_trainer(
        max_steps=5, exact_warmup_steps=warm_up, row_sparse_head=row_sparse_head, **LAYOUTS["per item"], **CALM
    )
    counts = touched(trainer)
    trainer.train()
    assert counts[:2] == [40, 40] and max(counts[2:]) < 40
    steps = trainer.optimizer.state[trainer.head.module.weight]["step"]
    if row_sparse_head:
        assert steps.min() >= 2 and steps.max() <= 5 and steps.sum() == sum(counts)


def test_a_run_resumed_after_its_warm_up_goes_on_sampling(make_trainer):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "exact_warmup_steps": 2}
    settings = {**steps, "num_tails": 1}  # several would hold all classes
    whole = make_trainer(row_sparse_head=True, **settings)
    expected = {name: value.clone() for name, value in trained(whole).items()}
    resumed = make_trainer(vit(40, seed=7), row_sparse_head=True, **settings)
    counts = touched(resumed)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert len(counts) == 2 and max(counts) < 40
    assert_near(resumed.model.state_dict(), expected, 0)


@pytest.mark.parametrize("value", [-1, 1.5, float("inf"), float("nan")])
def test_no_number_of_steps(make_trainer, value):
    with pytest.raises(
        ValueError, match=r"exact_warmup_steps is .*: it has to be a whole number of steps, or a share"
    ):
        make_trainer(exact_warmup_steps=value)
