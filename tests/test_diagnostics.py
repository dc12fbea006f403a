"""Effective sample size, coverage, the share of certain classes, the probe, running means."""

from dataclasses import replace

import pytest
import torch
from models import column_ids
from torch import nn

from hf_dis import make_sampler
from hf_dis.diagnostics import RunningMeans, certain_share, coverage, effective_sample_size, probe
from hf_dis.losses import sampled_distillation_loss
from hf_dis.streaming import AfterHead
from hf_dis.targets import TeacherTargets

N, C, TEMPERATURE = 6, 30, 2.0
LAYOUTS = [
    {"num_shared_classes": 0},
    {"num_shared_classes": 0, "sampler": "replacement"},
    {"num_shared_classes": 8},
]


def draw_from(logits, labels=None, **layout):
    sampler = make_sampler(C, **{"num_sampled_classes": 6, "rank_depth": 10, **layout})
    return sampler.draw([TeacherTargets(chunk, TEMPERATURE, 10) for chunk in logits.split(4)], labels)


def ids_and_use(draw):
    ids = column_ids(draw)
    return ids.tolist(), (draw.log_weights > -torch.inf).tolist()


@pytest.mark.parametrize("labels", [None, torch.arange(N)], ids=["no labels", "labels"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_coverage_is_the_teachers_mass_of_the_classes_drawn(layout, labels):
    logits = 2 * torch.randn(N, C)
    p = (logits.double() / TEMPERATURE).softmax(1)
    draw = draw_from(logits, labels, **layout)
    expected = [
        sum(p[row, c] for c in {c for c, used in zip(ids, use, strict=True) if used})
        for row, (ids, use) in enumerate(zip(*ids_and_use(draw), strict=True))
    ]
    before = draw.log_weights.clone()
    torch.testing.assert_close(coverage(draw).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(draw.log_weights, before)


def test_with_all_classes_drawn_coverage_is_one_and_every_class_counts():
    draw = draw_from(torch.randn(N, C), num_sampled_classes=C, num_shared_classes=0)
    torch.testing.assert_close(coverage(draw), torch.ones(N))
    assert effective_sample_size(draw, torch.zeros(N, C)).tolist() == [C] * N
    assert certain_share(draw).tolist() == [1.0] * N


@pytest.mark.parametrize("layout", LAYOUTS)
def test_effective_sample_size_by_definition(layout):
    draw = draw_from(torch.randn(N, C), torch.arange(N), **layout)
    logits = torch.randn(draw.log_weights.shape)
    disagreement = sampled_distillation_loss(logits, draw, TEMPERATURE)[1]
    found = effective_sample_size(draw, disagreement)
    for row in range(N):
        used = draw.log_weights[row] > -torch.inf
        random = used & ~draw.certain[row]
        share = draw.log_weights[row][random].exp() * (logits[row][random] / TEMPERATURE).exp()
        expected = (used & draw.certain[row]).sum() + share.sum() ** 2 / (share**2).sum()
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=0)
    assert (found >= 1).all() and (found <= draw.log_weights.shape[1]).all()


def test_certain_share_counts_the_ranked_columns_only():
    draw = draw_from(torch.randn(N, C), torch.arange(N), num_shared_classes=8)
    certain = torch.zeros_like(draw.certain)
    certain[:, :3] = True
    certain[:, 6:] = True  # the label's column and the tail
    assert certain_share(replace(draw, certain=certain)).tolist() == [0.5] * N


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_probe_compares_with_dense_distillation(layout, bias, dense_kd):
    """Every figure against dense float64 autograd; teacher logits in chunks of other sizes than the draw's."""
    head = nn.Linear(5, C, bias=bias).double()
    features, teacher = torch.randn(N, 5, dtype=torch.float64), 2 * torch.randn(N, C, dtype=torch.float64)
    draw = draw_from(teacher, torch.arange(N), **layout)
    figures = probe(head.weight, head.bias, features, draw, teacher.split(5), TEMPERATURE, AfterHead())

    given = features.clone().requires_grad_()
    logits = head(given)
    exact = dense_kd(logits, teacher, TEMPERATURE).mean()
    ids = column_ids(draw)
    scaled = logits.gather(1, ids) / TEMPERATURE
    normaliser = (draw.log_weights.exp() * scaled.exp()).sum(1, keepdim=True).log()
    sampled = TEMPERATURE**2 * (draw.target * (draw.log_probs - scaled + normaliser)).sum(1).mean()
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


def test_probe_of_a_complete_draw_finds_no_error():
    head, features, teacher = nn.Linear(5, C).double(), torch.randn(N, 5).double(), torch.randn(N, C).double()
    draw = draw_from(teacher, num_sampled_classes=C, num_shared_classes=0)
    figures = probe(head.weight, head.bias, features, draw, [teacher], TEMPERATURE, AfterHead())
    assert figures["relative_error"] < 1e-10 and figures["cosine"] == pytest.approx(1)


def test_running_means_weigh_every_element_alike_and_start_anew():
    means = RunningMeans()
    means.add({"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(4.0, requires_grad=True)})
    means.add({"a": torch.tensor([10.0])})
    assert means.pop() == {"a": 4.0, "b": 4.0}
    assert means.pop() == {}
    means.add({"a": torch.tensor([5.0])})
    two_processes = {"sum": lambda sums: {name: value + torch.tensor([7.0, 1.0]) for name, value in sums.items()}}
    assert means.pop(two_processes["sum"]) == {"a": 6.0}
