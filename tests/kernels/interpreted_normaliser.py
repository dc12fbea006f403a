"""The normaliser and the class mass of teacher logits against float64. Run by test_kernels.py in the interpreter."""

import pytest
import torch
from torch.library import opcheck

from hf_dis.teacher.triton_normaliser import class_mass, log_normaliser, take_ranked

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def case(num_items, num_classes, dtype=torch.float32, scale=5.0):
    """Logits within wider rows, some classes masked."""
    wider = torch.full((num_items, num_classes + 3), torch.nan, dtype=dtype)
    wider[:, 1:-2] = scale * torch.randn(num_items, num_classes)
    logits = wider[:, 1:-2]
    logits[:, 1::3] = -torch.inf
    return logits


def mass(logits, temperature, every):
    probabilities = (logits.double() / temperature).softmax(1)
    return every * probabilities[::every].sum(0)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("num_items", "num_classes"), [(1, 1), (5, 7), (17, 300), (1, 8200)])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_normaliser_and_mass_are_those_of_float64(dtype, num_items, num_classes, temperature):
    """A block is of 8,192 classes."""
    logits = case(num_items, num_classes, dtype)
    found, _ = log_normaliser(logits, temperature)
    wide, tolerance = (torch.float64, 1e-12) if dtype == torch.float64 else (torch.float32, 1e-5)
    expected = (logits.double() / temperature).logsumexp(1, keepdim=True)
    assert found.dtype == wide and found.shape == (num_items, 1)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for every in (1, 4):
        summed = class_mass(logits[::every], found[::every], temperature, every)
        assert summed.dtype == wide and summed.shape == (num_classes,)
        torch.testing.assert_close(summed.double(), mass(logits, temperature, every), rtol=10 * tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("num_classes", "num_groups"), [(40, 5), (47, 5), (9000, 1100), (8, 1)])
def test_the_maxima_of_groups(dtype, num_classes, num_groups):
    """A block is of 1,024 groups; some classes are in no group."""
    logits = case(5, num_classes, dtype)
    found, maxima = log_normaliser(logits, 2.0, num_groups, 8)
    expected = logits[:, : 8 * num_groups].unflatten(1, (8, num_groups)).amax(1)
    assert maxima.dtype == dtype and torch.equal(maxima, expected)
    torch.testing.assert_close(found, log_normaliser(logits, 2.0)[0])


def test_any_temperature_is_that_of_float64_to_rounding():
    logits = case(5, 100)
    expected = (logits.double() / 0.7).logsumexp(1, keepdim=True)
    torch.testing.assert_close(log_normaliser(logits, 0.7)[0].double(), expected, rtol=1e-6, atol=0)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e4, -3e4, 2.9e4], [-6e4, -6e4, -6e4]], dtype=torch.float16)
    found, _ = log_normaliser(logits, 0.5)
    torch.testing.assert_close(found[:, 0].double(), (2 * logits.double()).logsumexp(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        class_mass(logits, found, 0.5, 1), torch.tensor([4 / 3, 1 / 3, 1 / 3]), atol=1e-2, rtol=0
    )


def test_what_is_not_finite_stays_so_in_its_own_item():
    logits = torch.zeros(5, 4)
    logits[0, 2], logits[1, 0], logits[2], logits[3, 1:] = torch.nan, torch.inf, -torch.inf, -torch.inf
    found = log_normaliser(logits, 2.0)[0][:, 0]
    assert not found[:3].isfinite().any() and found[2] == -torch.inf
    torch.testing.assert_close(found[3:], torch.tensor([1.0, 4.0]).log())
    assert class_mass(logits, found[:, None], 2.0, 1).isnan().any()
    assert class_mass(logits[3:], found[3:, None], 2.0, 1).tolist() == pytest.approx([1.25, 0.25, 0.25, 0.25])


def test_no_items():
    logits = torch.empty(0, 5)
    assert [one.shape for one in log_normaliser(logits, 2.0, 2, 2)] == [(0, 1), (0, 2)]
    assert class_mass(logits, torch.empty(0, 1), 2.0, 8).tolist() == [0] * 5


def test_columns_may_be_apart():
    logits = case(5, 7).contiguous()
    apart = logits.T.contiguous().T
    assert torch.equal(log_normaliser(apart, 2.0)[0], log_normaliser(logits, 2.0)[0])


def test_the_operations_are_well_formed():
    logits = case(5, 7).contiguous()
    opcheck(log_normaliser, (logits, 2.0, 3, 2))
    opcheck(class_mass, (logits, log_normaliser(logits, 2.0)[0], 2.0, 2))


@pytest.mark.parametrize("every", [1, 4])
def test_ranked_classes_are_taken_out_of_the_mass(every):
    """At every item of a slice; several items rank the same classes."""
    ids = torch.stack([torch.randperm(50)[:7] for _ in range(21)])
    log_probs, mass = torch.rand(21, 20).log()[:, 3:10], torch.rand(50)
    taken = torch.zeros(50).index_add_(0, ids[2:19:every].flatten(), log_probs[2:19:every].exp().flatten())
    expected = mass - 3 * taken
    take_ranked(mass, ids, log_probs, 2, 19, every, 3.0)
    torch.testing.assert_close(mass, expected)
    opcheck(take_ranked, (mass, ids, log_probs, 2, 19, every, 3.0))
