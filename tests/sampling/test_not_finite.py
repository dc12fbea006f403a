"""NaN and Inf in logits: the proposals learn nothing from these items, and count them."""

import warnings
from dataclasses import fields, replace

import pytest
import torch
from fake_cuda import fake_cuda
from transformers import TrainerCallback

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.loss.divergence import sampled_forward_kl
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.sampling.sample import ClassSample
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import TargetLayout, compact_targets
from hf_dis.teacher.targets import TeacherTargets

N, C, BAD = 6, 40, 2
SPEC = SamplerSpec(num_sampled_classes=4, num_shared_classes=8, num_tails=1, rank_depth=10)
LAYOUTS = {
    "shared tail": SPEC,
    "per item": replace(SPEC, num_shared_classes=0),
    "teacher": replace(SPEC, proposal="teacher"),
}
COLUMNS = {"ranked": 1, "label": 4, "tail": -1}


def sample_of(sampler, labels=None, logits=None):
    logits = torch.randn(N, C) if logits is None else logits
    return sampler.sample([TeacherTargets(logits, 2.0, sampler.rank_depth)], labels)


def state_of(sampler):
    return {name: value.clone() for name, value in sampler.state_dict().items()}


def without(values, item):
    """The values of all items but one, a tensor or a sample whose items all use the same tail."""
    kept = torch.arange(len(values)) != item
    if isinstance(values, torch.Tensor):
        return values[kept]
    names = [field.name for field in fields(ClassSample)]
    per_item = {n: v for n in names if isinstance(v := getattr(values, n), torch.Tensor) and len(v) == len(values)}
    return replace(values, **{name: value[kept] for name, value in per_item.items()})


def signal_of(sample, bad=None, column=None):
    """The signal of random logits; ``bad`` is one of them, at a column that item ``BAD`` uses."""
    logits = torch.randn(sample.log_weights.shape, generator=torch.Generator().manual_seed(1))
    if bad is not None:
        logits[BAD, column] = bad
    return sampled_forward_kl(logits, sample, 2.0).signal


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("spec", LAYOUTS.values(), ids=LAYOUTS)
def test_an_item_with_nan_or_inf_is_as_if_it_were_not_there(spec, column, bad):
    """But for the teacher's marginal, which does not depend on the student."""
    samplers = [make_sampler(C, spec) for _ in range(3)]
    labels = torch.arange(N)
    sample = sample_of(samplers[0], labels)
    if column == -1 and spec.num_shared_classes:  # a column that the item uses
        sample.log_weights[BAD, -1], sample.outside_top[BAD, -1] = 1.0, True
    samplers[0].learn(sample, signal_of(sample, bad, column))
    samplers[1].learn(without(sample, BAD), without(signal_of(sample), BAD))
    samplers[2].learn(sample, signal_of(sample))
    left_out, fewer, all_of_them = map(state_of, samplers)
    learns = not (spec.proposal == "teacher" and not spec.num_shared_classes)
    assert int(left_out["not_finite"]) == learns and int(all_of_them["not_finite"]) == 0
    for name in samplers[0].proposal.state_dict():
        expected = all_of_them if name == "class_marginal" else fewer
        torch.testing.assert_close(left_out[name], expected[name], msg=name)


@pytest.mark.parametrize("spec", LAYOUTS.values(), ids=LAYOUTS)
def test_a_batch_of_nan_renews_no_running_mean_but_the_marginal(spec):
    """The weights of the ranks move on to the values that were known before."""
    sampler = make_sampler(C, spec)
    for _ in range(3):
        sample = sample_of(sampler)
        sampler.learn(sample, signal_of(sample))
    sample, before = sample_of(sampler), state_of(sampler)
    sampler.learn(sample, torch.full_like(sample.log_weights, torch.nan))
    after = state_of(sampler)
    assert int(after["not_finite"]) == N
    for name in sampler.proposal.state_dict():
        assert after[name].isfinite().all(), name
        if name not in ("class_marginal", "rank_weights"):
            torch.testing.assert_close(after[name], before[name], msg=name)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("spec", LAYOUTS.values(), ids=LAYOUTS)
def test_a_teacher_that_was_not_checked(spec, bad):
    """On an accelerator its values are looked at in some steps only."""
    sampler, logits = make_sampler(C, spec), torch.randn(N, C)
    logits[BAD, 3] = bad
    for teacher in (logits, torch.randn(N, C)):
        sample = sample_of(sampler, logits=teacher)
        sampler.learn(sample, signal_of(sample))
    assert all(value.isfinite().all() for value in sampler.proposal.state_dict().values())
    assert int(sampler.not_finite) == (spec.num_shared_classes > 0 or spec.proposal == "dis")


def test_stored_targets():
    layout = TargetLayout(C, 6, 8)
    stored = CachedTargets(compact_targets(torch.randn(N, C), 2.0, 6, 8, torch.Generator().manual_seed(0)), C)
    sampler = make_cached_sampler(layout, SamplerSpec(num_shared_classes=8))
    sample = sampler.sample([stored])
    sampler.learn(sample, signal_of(sample, torch.nan, 0))
    assert all(value.isfinite().all() for value in sampler.proposal.state_dict().values())
    assert int(sampler.not_finite) == 1


def test_an_overflow_at_a_column_that_is_not_used_leaves_nothing_out():
    sampler = make_sampler(C, SPEC)
    sample = sample_of(sampler)
    sample.log_weights[BAD, -1], sample.outside_top[BAD, -1] = -torch.inf, False
    signal = signal_of(sample)
    signal[BAD, -1] = torch.inf
    sampler.learn(sample, signal)
    assert int(sampler.not_finite) == 0
    assert all(value.isfinite().all() for value in sampler.proposal.state_dict().values())


def test_processes_learn_the_same_where_one_of_them_met_nan():
    samplers, parts, samples = [make_sampler(C, SPEC, seed=seed) for seed in (0, 1)], [], []
    for number, sampler in enumerate(samplers):
        samples.append(sample_of(sampler))
        signal = signal_of(samples[-1], *((torch.nan, 0) if number else ()))
        make_sampler(C, SPEC).learn(samples[-1], signal, lambda statistics: parts.append(statistics) or statistics)
    summed = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    for number, (sampler, sample) in enumerate(zip(samplers, samples, strict=True)):
        sampler.learn(sample, signal_of(sample, *((torch.nan, 0) if number else ())), lambda _: summed)
    first, second = map(state_of, samplers)
    for name in samplers[0].proposal.state_dict():
        assert torch.equal(first[name], second[name]) and first[name].isfinite().all(), name
    assert int(first["not_finite"]) == int(second["not_finite"]) == 1


def test_the_number_is_logged_when_there_is_one_told_once_and_resumed():
    sampler, restored = make_sampler(C, SPEC), make_sampler(C, SPEC)
    sample = sample_of(sampler)
    sampler.learn(sample, signal_of(sample))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "dis/not_finite" not in sampler.scalars()
    sampler.learn(sample, signal_of(sample, torch.nan, 0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            assert sampler.scalars() == {**sampler.proposal.scalars(), "dis/not_finite": 1}
    assert len(told) == 1 and "NaN or Inf" in str(told[0].message)
    restored.load_state_dict(sampler.state_dict())
    assert int(restored.not_finite) == 1


class Overflow(TrainerCallback):
    """The student's head becomes NaN after the first step, whose logits are checked."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                model.classifier.weight.fill_(torch.nan)


def test_a_trainer_logs_it(make_trainer):
    trainer = make_trainer(max_steps=2, logging_steps=1, callbacks=[Overflow()])
    with pytest.warns(RuntimeWarning, match="NaN or Inf"):
        trainer.train()
    assert [log.get("dis/not_finite") for log in trainer.state.log_history if "loss" in log] == [None, 8]
    state = trainer.distiller.sampler.proposal.state_dict()
    assert all(value.isfinite().all() for value in state.values())


def test_a_step_waits_for_the_device_no_more_than_before():
    """Loss and sampler wait nowhere; backward waits for the number of distinct classes."""
    with fake_cuda() as counts:
        dis_loss = DISLoss(make_sampler(C, SPEC, device="cuda"))
        dis_loss._has_checked_values = True  # only the first batch is looked into
        features, weight = torch.empty(N, 4, device="cuda"), torch.empty(C, 4, device="cuda", requires_grad=True)
        dis_loss(features, weight, None, torch.empty(N, C, device="cuda"))
        assert dis_loss.sampler.not_finite.is_cuda
    assert not counts.waits
