"""Samples of whole steps by the kernels against plain torch. Run by test_kernels.py in Triton's interpreter."""

from dataclasses import fields
from itertools import product

import pytest
import torch
from torch.library import opcheck

from hf_dis import SamplerSpec, make_sampler
from hf_dis.kernels import VARIABLE
from hf_dis.sampling import triton_assembly as kernels
from hf_dis.sampling.designs import inclusion_probabilities
from hf_dis.sampling.triton_item_columns import item_columns
from hf_dis.teacher import triton_ranking
from hf_dis.teacher.ranking import top_ranked
from hf_dis.teacher.targets import TeacherTargets
from hf_dis.teacher.triton_normaliser import class_mass, log_normaliser

# Classes, items, m, K, K_t, G: a block of a tail is of 1,024 columns.
CASES = {
    "few": (40, 6, 8, 4, 8, 2),
    "not a multiple of a group": (203, 5, 12, 5, 30, 4),
    "all ranks are certain": (40, 3, 4, 4, 8, 1),
    "fewer groups than ranks": (40, 3, 15, 6, 8, 1),
    "one rank": (30, 3, 1, 1, 5, 2),
    "a tail of two blocks": (1500, 2, 8, 4, 1100, 1),
    "no item": (40, 0, 8, 4, 8, 2),
}


def sampled(name, case, proposal, labelled, dtype, scale, steps, monkeypatch):
    """Samples of a sampler that learns between them, from two chunks of items."""
    num_classes, num_items, depth, num_sampled, num_shared, num_tails = case
    spec = SamplerSpec(
        num_sampled_classes=num_sampled, num_shared_classes=num_shared, num_tails=num_tails, rank_depth=depth,
        proposal=proposal,
    )  # fmt: skip
    sampler, generator = make_sampler(num_classes, spec, seed=1), torch.Generator().manual_seed(0)
    samples = []
    for _ in range(steps):
        logits = (scale * torch.randn(num_items, num_classes, generator=generator)).to(dtype)
        if num_items:
            logits[0, ::3] = -torch.inf
        labels = torch.randint(num_classes, (num_items,), generator=generator) if labelled else None
        if labelled and num_items:
            labels[-1] = logits[-1].argmax()
        monkeypatch.setenv(VARIABLE, "torch")
        whole = TeacherTargets(logits, 2.0, depth)
        monkeypatch.setenv(VARIABLE, name)
        first = num_tails * (num_items // num_tails // 2)
        chunks = [TeacherTargets(part, 2.0, depth) for part in (logits[:first], logits[first:])]
        for chunk, ids in zip(chunks, (whole.ids[:first], whole.ids[first:]), strict=True):
            assert torch.equal(chunk.logits.gather(1, chunk.ids), chunk.logits.gather(1, ids))
            # Equal logits may be ranked in another order.
            chunk._found = chunk.log_normaliser.T, chunk.candidates._replace(places=ids)
        sample = sampler.sample(chunks, labels)
        samples.append(sample)
        sampler.learn(sample, torch.rand(sample.log_weights.shape, generator=generator))
    return samples


@pytest.mark.parametrize(("proposal", "labelled"), [("dis", True), ("teacher", False), ("uniform", True)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sample_is_that_of_plain_torch(case, proposal, labelled, monkeypatch):
    check(case, proposal, labelled, torch.float32, 3, 2, monkeypatch)


@pytest.mark.parametrize("scale", [0.1, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logits_of_any_type_and_spread(dtype, scale, monkeypatch):
    check(CASES["not a multiple of a group"], "dis", True, dtype, scale, 1, monkeypatch)


def check(*given):
    for expected, found in zip(*(sampled(name, *given) for name in ("torch", "triton")), strict=True):
        for field in fields(expected):
            wanted, value = getattr(expected, field.name), getattr(found, field.name)
            if field.name == "certain":
                wanted, value = (values | expected.log_weights.isneginf() for values in (wanted, value))
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(
                    value, wanted, rtol=2e-4, atol=2e-5, msg=lambda m, f=field: f"{f.name}: {m}"
                )
            else:
                assert value == wanted


@pytest.mark.parametrize("num_sampled", [1, 3, 6, 7, 9])
def test_inclusion_is_that_of_the_definition(num_sampled):
    density = torch.rand(5, 7, dtype=torch.float64).sort(1, descending=True).values ** 4
    expected, cumulative = kernels.rank_inclusion(density, num_sampled)
    wanted = inclusion_probabilities(density, num_sampled)
    torch.testing.assert_close(expected, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(cumulative, wanted.cumsum(1), rtol=1e-12, atol=0)


# The interpreter takes half a minute for 2,055 classes.
RANKED = [*product([(16, 1), (48, 3), (203, 12)], [torch.float32, torch.bfloat16, torch.float16])]
RANKED += [((2055, 100), torch.bfloat16)]


@pytest.mark.parametrize(("sizes", "dtype"), RANKED, ids=str)
def test_the_ranking_is_that_of_a_sort(sizes, dtype):
    num_classes, depth = sizes
    logits = torch.randn(3, num_classes).to(dtype)
    logits[0, : num_classes - depth] = -torch.inf
    logits[2, 5:9] = 7.0  # of equal logits the lower class is first
    groups = num_classes // 8
    best = logits[:, : 8 * groups].unflatten(1, (8, groups)).amax(1).topk(depth, dim=1).indices
    top, ids = triton_ranking.rank_groups(logits, best, groups, 8)
    expected = logits.sort(dim=1, descending=True).values
    assert torch.equal(top, expected[:, :depth]) and torch.equal(logits.gather(1, ids), top)
    # Of groups with the same best logit any may be chosen; a class beyond the groups is always looked at.
    classes = torch.arange(num_classes)
    looked_at = torch.isin(classes % groups, best[2]) | (classes >= 8 * groups)
    order = logits[2].masked_fill(~looked_at, -torch.inf).sort(descending=True, stable=True).indices
    assert torch.equal(ids[2], order[:depth]) and torch.equal(top_ranked(logits, depth, best)[0], top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "depth"), [(1, 1), (9, 9), (40, 7), (5000, 30)])
def test_the_best_places_are_those_of_topk(width, depth, dtype):
    """A block is of 4,096 values; some are equal, masked, NaN or of either sign."""
    values = torch.randn(4, width).to(dtype)
    values[1] = values[1].round()
    values[2, : width - width // 3] = -torch.inf
    values[3] = -values[3].abs()
    values[3, width // 2] = torch.nan
    places = triton_ranking.best_places(values, depth)
    assert all(len(row.unique()) == depth for row in places)
    found = values.gather(1, places).sort(1, descending=True).values
    assert torch.equal(found.nan_to_num(99), values.topk(depth, dim=1).values.nan_to_num(99))


@pytest.mark.parametrize(
    ("labelled", "dtype"), [(True, torch.float32), (False, torch.bfloat16), (True, torch.float16)], ids=str
)
@pytest.mark.parametrize(
    ("num_classes", "depth", "num_shared", "programs"), [(203, 12, 30, 512), (48, 1, 5, 512), (203, 12, 30, 2)]
)
def test_all_answers_of_an_item_are_those_of_the_single_kernels(
    num_classes, depth, num_shared, programs, labelled, dtype, monkeypatch
):
    """Two programs take the five items in turn."""
    monkeypatch.setattr(triton_ranking, "PROGRAMS", programs)
    wider = torch.randn(5, num_classes + 3).to(dtype)
    logits, first_item = wider[:, 1:-2], 3
    logits[0, ::3] = -torch.inf
    tails = torch.stack([torch.randperm(num_classes)[:num_shared].sort().values for _ in range(4)])
    labels = torch.randint(num_classes, (first_item + 5,)) if labelled else None
    given = tails, labels, first_item
    normaliser, maxima, best, *ranked, columns = triton_ranking.answers_of_items(logits, 0.7, depth, 8, *given)
    expected, of_groups = log_normaliser(logits, 0.7, num_classes // 8, 8)
    last = [4, 3] if programs == 2 else range(5)
    places = triton_ranking.best_places(of_groups, depth)
    assert torch.equal(normaliser, expected) and torch.equal(maxima, of_groups[last])
    assert torch.equal(best, places[last])
    for found, single in zip(ranked, triton_ranking.rank_groups(logits, places, num_classes // 8, 8), strict=True):
        assert torch.equal(found, single)
    assert torch.equal(columns, triton_ranking.answers_at(logits, ranked[0], normaliser, *given, 0.7))


def test_a_mass_is_added():
    logits, normaliser, added = torch.randn(5, 300), torch.zeros(5, 1), torch.rand(300)
    alone = class_mass(logits, normaliser, 2.0, 3.0)
    torch.testing.assert_close(class_mass(logits, normaliser, 2.0, 3.0, added), alone + added)


def test_the_operations_are_well_formed():
    logits, ids = torch.randn(4, 40), torch.stack([torch.randperm(40)[:3] for _ in range(4)])
    tails, labels = torch.tensor([[1, 5], [2, 9]]), torch.tensor([3, 4, 1, 0])
    normaliser = logits.logsumexp(1, keepdim=True)
    opcheck(triton_ranking.best_places, (logits, 3))
    opcheck(triton_ranking.rank_groups, (logits, torch.tensor([[0, 1, 4]] * 4), 5, 8))
    opcheck(triton_ranking.answers_of_items, (logits, 2.0, 2, 8, tails, labels, 0))
    density = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    opcheck(kernels.rank_inclusion, (density, 2))
    inclusion, starts = torch.full((2, 2), 0.5, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    for given in (labels, None):
        opcheck(triton_ranking.answers_at, (logits, logits[:, :3], normaliser, tails, given, 0, 2.0))
        columns = triton_ranking.answers_at(logits, logits[:, :3], normaliser, tails, given, 0, 2.0)
        expected = kernels.rank_inclusion(density, 2)
        opcheck(kernels.assemble, (ids, columns, tails, inclusion, *expected, starts, given, 2))
        opcheck(kernels.assemble, (ids, columns, tails, inclusion, None, None, None, given, 3))
        of_label = None if given is None else columns[:, -1:]
        for points, number in (((*expected, starts), 2), ((None, None, None), 3)):
            opcheck(item_columns, (ids, columns[:, :3], of_label, number, *points, given))
