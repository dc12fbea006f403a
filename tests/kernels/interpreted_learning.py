"""The statistics and steps of a proposal against plain torch. Run by test_kernels.py in Triton's interpreter."""

import pytest
import torch
from torch.library import opcheck

from hf_dis import SamplerSpec, make_sampler
from hf_dis.sampling import sampler as sampling
from hf_dis.sampling import triton_learning as kernels
from hf_dis.sampling import triton_steps as steps
from hf_dis.sampling.class_memory import ClassMemory
from hf_dis.teacher.targets import TeacherTargets

# Items, classes, and tails: a program sums 64 items of ranks, and 32 columns of a tail.
CASES = {
    "few": (5, 40, 8, 2, 1),
    "more items than a block": (70, 60, 8, 3, 2),
    "more columns than a block": (9, 200, 40, 20, 4),
    "a tail without items": (2, 60, 8, 3, 4),
    "no item": (0, 40, 8, 2, 2),
}


def learnt(name, case, bad, monkeypatch):
    """The state of a sampler after three steps."""
    monkeypatch.setenv("HF_DIS_KERNELS", "torch")
    num_items, num_classes, depth, num_sampled, num_tails = case
    spec = SamplerSpec(
        num_sampled_classes=num_sampled, num_shared_classes=35 if num_classes > 60 else 6, num_tails=num_tails,
        rank_depth=depth, proposal_decay=0.75,
    )  # fmt: skip
    sampler = make_sampler(num_classes, spec)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        logits = 3 * torch.randn(num_items, num_classes, generator=generator)
        monkeypatch.setenv("HF_DIS_KERNELS", "torch")
        sample = sampler.sample([TeacherTargets(logits, 2.0, depth)])
        signal = torch.randn(sample.log_weights.shape, generator=generator)
        signal[: bad * step, step::3] = [torch.nan, torch.inf, -torch.inf][step]
        monkeypatch.setenv("HF_DIS_KERNELS", name)
        sampler.learn(sample, signal)
    return sampler.state_dict()


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sampler_learns_what_it_learns_by_plain_torch(case, bad, monkeypatch):
    monkeypatch.setattr(sampling, "_is_known_to_be_finite", lambda signal: False)
    expected, found = (learnt(name, case, bad, monkeypatch) for name in ("torch", "triton"))
    assert bad == 0 or case[0] == 0 or found["not_finite"] > 0
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-9)


def test_a_class_of_several_tails_is_renewed_once(monkeypatch):
    """By the sum over its tails, in a block and over blocks of 256; a class that no item meets stays as it was."""
    ids = torch.cat([torch.arange(0, 600), torch.arange(0, 600, 3), torch.tensor([7, 7, 7])])
    values = torch.stack([torch.rand(len(ids)), torch.randint(1, 4, (len(ids),))], 1)
    values[5] = 0
    tail = torch.sparse_coo_tensor(ids[None], values, (700, 2), check_invariants=False)
    statistics = {
        "tail": tail, "class_mass": torch.rand(700), "items": torch.tensor(8), "not_finite": torch.tensor(1)
    }  # fmt: skip
    statistics["class_mass"][3:6] = torch.tensor([torch.nan, torch.inf, -1e-3])
    states = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("HF_DIS_KERNELS", name)
        memory = ClassMemory(700, 0.75)
        memory.marginal.uniform_(generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            memory.update(statistics)
        states.append((memory.squared_signal, memory.marginal))
        assert not memory._sums.any()
    for expected, found in zip(*states, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_items_are_finite_where_their_used_columns_are(dtype):
    signal = torch.zeros(6, 1030, dtype=dtype)  # a block is of 1,024 columns
    log_weights = torch.zeros(6, 1030)
    for item, value in enumerate((torch.nan, torch.inf, -torch.inf), 1):
        signal[item, 1024 + item] = value
    signal[4:, 3] = torch.nan
    log_weights[4, 3] = -torch.inf
    assert kernels.finite_items(signal, log_weights).tolist() == [True, False, False, False, True, False]


@pytest.mark.parametrize(
    ("num_items", "num_tails", "num_shared", "num_held"), [(70, 3, 5, 2), (5, 2, 40, 1), (3, 4, 3, 0)]
)
def test_sums_over_classes_that_an_item_does_not_hold(num_items, num_tails, num_shared, num_held):
    """By the marks of these classes, or by the classes that the item holds; a block is of 32 items and columns."""
    signal, finite = torch.randn(num_items, num_shared), torch.rand(num_items) < 0.8
    held = torch.randint(60, (num_items, num_held))
    tails = torch.stack([torch.randperm(60)[:num_shared] for _ in range(num_tails)])
    of_items = tails[torch.arange(num_items) % num_tails]
    outside = (of_items[:, :, None] != held[:, None]).all(2)
    found = kernels.tail_sums_outside(signal, held, tails, finite)
    assert torch.equal(found, kernels.tail_sums(signal, outside, finite, num_tails))
    assert found[:, 1].sum() == outside[finite].sum() < finite.sum() * num_shared or not num_held


@pytest.mark.parametrize("num_items", [0, 5, 5000])
def test_items_are_counted(num_items):
    finite = torch.rand(num_items) < 0.5
    assert kernels.item_counts(finite).tolist() == [int(finite.sum()), int((~finite).sum())]


def test_the_operations_are_well_formed():
    signal, ranks = torch.randn(5, 7), torch.randint(9, (5, 3))
    finite, edges = torch.ones(5, dtype=torch.bool), torch.tensor([0, 2, 4, 9])
    opcheck(kernels.finite_items, (signal, signal))
    opcheck(kernels.item_counts, (finite,))
    opcheck(kernels.rank_sums, (signal, torch.rand(5, 3), ranks, finite, edges, torch.float64))
    opcheck(kernels.tail_sums, (signal[:, 3:], torch.rand(5, 4) < 0.5, finite, 2))
    tails = torch.stack([torch.randperm(9)[:4] for _ in range(2)])
    opcheck(kernels.tail_sums_outside, (signal[:, 3:], ranks, tails, finite))
    bins = [torch.rand(3, dtype=torch.float64) for _ in range(4)]
    scales, one = torch.rand(2, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    masses, items = torch.rand(2, 3, dtype=torch.float64), torch.tensor(5)
    opcheck(steps.step_ranks, (bins[0], items, bins[1], one, scales, masses, bins[2], bins[3], 0.25))
    opcheck(steps.step_classes, (torch.tensor([1, 4, 1]), torch.rand(6, 2), torch.rand(6), 0.25))
    opcheck(steps.step_marginal, (torch.rand(6), items, torch.tensor(0), torch.rand(6), 0.25))
