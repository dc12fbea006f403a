"""Effective sample size, coverage, the share of certain classes, the probe, running means."""

from dataclasses import replace

import pytest
import torch
from divergences_by_definition import definition
from tiny_models import column_ids
from torch import nn

from hf_dis import SamplerSpec, make_sampler
from hf_dis.loss.divergence import FORWARD_KL, sampled_forward_kl
from hf_dis.loss.f_divergence import JensenShannon
from hf_dis.models.after_head import AfterHead
from hf_dis.report.diagnostics import RunningMeans, certain_share, coverage, effective_sample_size, probe
from hf_dis.teacher.targets import TeacherTargets

N, C, TEMPERATURE = 6, 30, 2.0
LAYOUTS = [
    {"num_shared_classes": 0},
    {"num_shared_classes": 0, "design": "replacement"},
    {"num_shared_classes": 8},
]


def sample_of(logits, labels=None, **layout):
    sampler = make_sampler(C, SamplerSpec(**{"num_sampled_classes": 6, "rank_depth": 10, **layout}))
    return sampler.sample([TeacherTargets(chunk, TEMPERATURE, 10) for chunk in logits.split(4)], labels)


def ids_and_use(sample):
    ids = column_ids(sample)
    return ids.tolist(), (sample.log_weights > -torch.inf).tolist()


@pytest.mark.parametrize("labels", [None, torch.arange(N)], ids=["no labels", "labels"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_coverage_is_the_teachers_mass_of_the_sampled_classes(layout, labels):
    logits = 2 * torch.randn(N, C)
    p = (logits.double() / TEMPERATURE).softmax(1)
    sample = sample_of(logits, labels, **layout)
    expected = [
        sum(p[item, c] for c in {c for c, used in zip(ids, use, strict=True) if used})
        for item, (ids, use) in enumerate(zip(*ids_and_use(sample), strict=True))
    ]
    before = sample.log_weights.clone()
    torch.testing.assert_close(coverage(sample).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(sample.log_weights, before)


def test_with_all_classes_sampled_coverage_is_one_and_every_class_counts():
    sample = sample_of(torch.randn(N, C), num_sampled_classes=C, num_shared_classes=0)
    torch.testing.assert_close(coverage(sample), torch.ones(N))
    assert effective_sample_size(sample, torch.zeros(N, C)).tolist() == [C] * N
    assert certain_share(sample).tolist() == [1.0] * N


@pytest.mark.parametrize("layout", LAYOUTS)
def test_effective_sample_size_by_definition(layout):
    sample = sample_of(torch.randn(N, C), torch.arange(N), **layout)
    logits = torch.randn(sample.log_weights.shape)
    found = effective_sample_size(sample, sampled_forward_kl(logits, sample, TEMPERATURE).log_student)
    for item in range(N):
        used = sample.log_weights[item] > -torch.inf
        random = used & ~sample.certain[item]
        share = sample.log_weights[item][random].exp() * (logits[item][random] / TEMPERATURE).exp()
        expected = (used & sample.certain[item]).sum() + share.sum() ** 2 / (share**2).sum()
        torch.testing.assert_close(found[item], expected, rtol=1e-4, atol=0)
    assert (found >= 1).all() and (found <= sample.log_weights.shape[1]).all()


def test_certain_share_counts_the_ranked_columns_only():
    sample = sample_of(torch.randn(N, C), torch.arange(N), num_shared_classes=8)
    certain = torch.zeros_like(sample.certain)
    certain[:, :3] = True
    certain[:, 6:] = True  # the label's column and the tail
    assert certain_share(replace(sample, certain=certain)).tolist() == [0.5] * N


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_probe_compares_with_dense_distillation(layout, bias, dense_kd):
    """Every figure against dense float64 autograd; teacher logits in chunks of other sizes than the sample's."""
    head = nn.Linear(5, C, bias=bias).double()
    features, teacher = torch.randn(N, 5, dtype=torch.float64), 2 * torch.randn(N, C, dtype=torch.float64)
    sample = sample_of(teacher, torch.arange(N), **layout)
    figures = probe(head.weight, head.bias, features, sample, teacher.split(5), TEMPERATURE, AfterHead())

    given = features.clone().requires_grad_()
    logits = head(given)
    exact = dense_kd(logits, teacher, TEMPERATURE).mean()
    ids = column_ids(sample)
    scaled = logits.gather(1, ids) / TEMPERATURE
    normaliser = (sample.log_weights.exp() * scaled.exp()).sum(1, keepdim=True).log()
    sampled = TEMPERATURE**2 * (sample.target * (sample.log_probs - scaled + normaliser)).sum(1).mean()
    g, g_hat = (torch.autograd.grad(loss, given, retain_graph=True)[0].flatten() for loss in (exact, sampled))
    expected = {
        "exact_kd_loss": exact.detach(),
        "sampled_kd_loss": sampled.detach(),
        "cosine": g @ g_hat / (g.norm() * g_hat.norm()),
        "relative_error": (g_hat - g).norm() / g.norm(),
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(figures[name], value, rtol=1e-5, atol=1e-8, msg=name)
    assert head.weight.grad is None


@pytest.mark.parametrize("divergence", [FORWARD_KL, JensenShannon()], ids=lambda one: one.name)
def test_probe_of_a_complete_sample_finds_no_error(divergence):
    head, features, teacher = nn.Linear(5, C).double(), torch.randn(N, 5).double(), torch.randn(N, C).double()
    sample = sample_of(teacher, num_sampled_classes=C, num_shared_classes=0)
    figures = probe(head.weight, head.bias, features, sample, [teacher], TEMPERATURE, AfterHead(), divergence)
    assert figures["relative_error"] < 1e-10 and figures["cosine"] == pytest.approx(1)
    expected = definition(divergence, head(features), teacher, TEMPERATURE).mean().detach()
    torch.testing.assert_close(figures["exact_kd_loss"], expected)
    torch.testing.assert_close(figures["sampled_kd_loss"], expected)


def test_running_means_weigh_every_element_alike_and_start_anew():
    means = RunningMeans()
    means.add({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(4.0, requires_grad=True)})
    means.add({"a": torch.tensor([10.0])})
    assert means.pop() == {"a": 4.0, "b": 4.0}
    assert means.pop() == {}
    means.add({"a": torch.tensor([5.0])})
    two_processes = {"sum": lambda sums: {name: value + torch.tensor([7.0, 1.0]) for name, value in sums.items()}}
    assert means.pop(two_processes["sum"]) == {"a": 6.0}
