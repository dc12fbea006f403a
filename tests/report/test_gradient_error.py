"""The estimated error of the gradient: its mean against the true error, over items, and through the Trainer."""

from dataclasses import replace

import pytest
import torch
from tiny_models import bart, labelled_images, labelled_tokens, llama, vit

from hf_dis import SamplerSpec, make_sampler
from hf_dis.head.sampled_linear import sampled_columns
from hf_dis.loss.f_divergence import make_divergence
from hf_dis.report import gradient_error as module
from hf_dis.report.diagnostics import LARGEST_ERROR, RunningMeans
from hf_dis.report.gradient_error import GradientError, gradient_error
from hf_dis.teacher.targets import TeacherTargets

C, N, D = 400, 64, 16
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
LAYOUTS = {
    "strata": {"num_sampled_classes": 16, "num_shared_classes": 120, "num_tails": 4, "rank_depth": 32},
    "certain top": {"num_sampled_classes": 16, "num_shared_classes": 120, "num_tails": 3, "rank_depth": 16},
    "per item": {"num_sampled_classes": 120, "num_shared_classes": 0},
    "with replacement": {"num_sampled_classes": 200, "num_shared_classes": 0, "design": "replacement"},
}


@pytest.fixture
def problem():
    """Features, a head, and logits of student and teacher that differ by half."""
    features, weight = torch.randn(N, D), torch.randn(C, D) / D**0.5
    teacher = weight + 0.5 * torch.randn(C, D) / D**0.5
    return weight, features @ weight.T, features @ teacher.T


def sampled(sampler, divergence, logits, teacher, labels=None):
    sample = sampler.sample([TeacherTargets(teacher, 1.0, sampler.rank_depth)], labels)
    columns = sampled_columns(logits, sample.item_ids, sample.tail_ids)
    return sample, divergence.sampled(columns, sample, 1.0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_its_mean_is_the_true_error(problem, name, layout):
    """Over samples of one batch, whose gradients are compared with the exact ones; within a fifth of the error."""
    weight, logits, teacher = problem
    divergence, sampler = make_divergence(name), make_sampler(C, SamplerSpec(**layout))
    labels = torch.arange(N) if layout.get("num_tails") == 4 else None
    exact = divergence.exact(logits, teacher, 1.0)[1] @ weight
    true, found, length = 0.0, 0.0, 0.0
    for _ in range(120):
        sample, result = sampled(sampler, divergence, logits, teacher, labels)
        sampler.learn(sample, result.signal)
        columns = sampled_columns(torch.arange(C).expand(N, C), sample.item_ids, sample.tail_ids)
        factors = divergence.weighted_signal(sample, result)
        gradient = (factors[:, :, None] * weight[columns]).sum(1)
        true += (gradient - exact).square().sum()
        error = gradient_error(weight, sample, result, divergence)
        found, length = found + error.squared_error.sum(), length + error.squared_length.sum()
    assert found / true == pytest.approx(1, abs=0.2)
    assert length / (120 * exact.square().sum()) == pytest.approx(1, abs=0.1)
    assert 0.01 < true / (120 * exact.square().sum()) < 1.5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_a_choice_there_is_no_error(problem, name):
    weight, logits, teacher = problem
    divergence, sampler = make_divergence(name), make_sampler(C, SamplerSpec(num_sampled_classes=C, rank_depth=C))
    error = gradient_error(weight, *sampled(sampler, divergence, logits, teacher), divergence)
    assert error.squared_error.tolist() == [0.0] * N
    exact = divergence.exact(logits, teacher, 1.0)[1] @ weight
    torch.testing.assert_close(error.squared_length, exact.square().sum(1), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("number", "num_tails", "stride"), [(64, 4, 1), (20, 4, 3), (21, 3, 2), (30, 1, 2)])
def test_some_items_are_measured_each_with_its_own_tail(problem, monkeypatch, number, num_tails, stride):
    weight, logits, teacher = problem
    spec = SamplerSpec(**LAYOUTS["strata"] | {"num_tails": num_tails})
    divergence, sampler = make_divergence("forward_kl"), make_sampler(C, spec)
    sample, result = sampled(sampler, divergence, logits, teacher, torch.arange(N))
    whole = gradient_error(weight, sample, result, divergence)
    monkeypatch.setattr(module, "MEASURED_ITEMS", number)
    some = gradient_error(weight, sample, result, divergence)
    items = torch.arange(0, N, stride)[:number]
    for values, of_all in zip(some, whole, strict=True):
        torch.testing.assert_close(values, of_all[items], rtol=1e-4, atol=1e-8)


def test_items_that_are_not_finite_have_no_part(problem):
    weight, logits, teacher = problem
    divergence, sampler = make_divergence("forward_kl"), make_sampler(C, SamplerSpec(**LAYOUTS["strata"]))
    sample, result = sampled(sampler, divergence, logits, teacher)
    broken = result.signal.clone()
    broken[3] = torch.nan
    error = gradient_error(weight, sample, result._replace(signal=broken), divergence)
    assert error.squared_error[3] == 0 and error.squared_error.isfinite().all() and error.squared_error[4] > 0


def test_weights_in_bfloat16_give_nearly_the_same(problem):
    weight, logits, teacher = problem
    divergence, sampler = make_divergence("forward_kl"), make_sampler(C, SamplerSpec(**LAYOUTS["strata"]))
    sample, result = sampled(sampler, divergence, logits, teacher)
    wide = gradient_error(weight, sample, result, divergence)
    narrow = gradient_error(weight.bfloat16(), sample, result, divergence)
    assert narrow.squared_error.dtype == torch.float32
    torch.testing.assert_close(narrow.squared_error.sum(), wide.squared_error.sum(), rtol=0.05, atol=0)


def test_means_are_roots_of_ratios_of_sums():
    means = RunningMeans()
    for squared, length in ((1.0, 10.0), (3.0, 90.0)):
        parts = torch.tensor([[0.25 * squared], [0.75 * squared], [length]])
        means.add({"error": GradientError(*parts), "other": torch.ones(2)})
    assert means.pop() == pytest.approx({"error": 0.2, "other": 1.0})
    means.add({"error": GradientError(*torch.tensor([[1.0], [0.0], [-2.0]]))})
    assert means.pop() == {"error": LARGEST_ERROR}


def logs(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_the_trainer_logs_it_near_the_probe(make_trainer):
    settings = {"num_sampled_classes": 16, "num_shared_classes": 12, "rank_depth": 20, "max_steps": 30}
    trainer = make_trainer(
        train_dataset=labelled_images(256, 40),
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        probe_steps=10,
        logging_steps=10,
        **settings,
    )
    found = logs(trainer)
    assert len(found) == 3
    for log in found:
        assert log["dis/gradient_error"] == pytest.approx(log["probe/relative_error"], rel=0.35)


@pytest.mark.parametrize("mode", [{"proposal": "topk", "num_shared_classes": 0}, {"head_mode": "exact"}], ids=str)
def test_where_nothing_is_sampled_none_is_logged(make_trainer, mode):
    (log,) = logs(make_trainer(max_steps=1, logging_steps=1, **mode))
    assert "dis/gradient_error" not in log


@pytest.mark.parametrize("build", [llama, bart])
def test_language_models_log_it_in_an_exact_start_too(make_trainer, build):
    settings = {"train_dataset": labelled_tokens(32, 50), "logging_steps": 1, "max_steps": 2, "exact_warmup_steps": 1}
    found = logs(make_trainer(build(50), build(50, seed=1, spread=30), **settings))
    assert all(0 < log["dis/gradient_error"] < 5 for log in found)


def test_a_sample_of_items_keeps_its_fields(problem):
    _, logits, teacher = problem
    divergence, sampler = make_divergence("forward_kl"), make_sampler(C, SamplerSpec(**LAYOUTS["strata"]))
    sample, _ = sampled(sampler, divergence, logits, teacher)
    whole = sample.of_items(torch.arange(N), torch.arange(4))
    for name, value in vars(replace(sample, updates=None)).items():
        assert (
            torch.equal(getattr(whole, name), value) if isinstance(value, torch.Tensor) else value == vars(whole)[name]
        )


def test_it_changes_nothing_in_training(make_trainer, monkeypatch):
    states = []
    for _ in range(2):
        trainer = make_trainer(vit(40))
        trainer.train()
        states.append(trainer.model.state_dict())
        monkeypatch.setattr("hf_dis.distiller.gradient_error", lambda *_: GradientError(*torch.ones(3, 1)))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
