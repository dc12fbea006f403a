"""The density over classes and shared tails against plain torch. Run by test_kernels.py in Triton's interpreter."""

import pytest
import torch
from torch.library import opcheck

from hf_dis.sampling import triton_tails as kernels
from hf_dis.sampling.class_memory import ClassMemory
from hf_dis.sampling.tails import ClassDensity, sample_tails


def both(function, monkeypatch):
    results = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("HF_DIS_KERNELS", name)
        results.append(function())
    return results


# A block is of 4,096 classes.
@pytest.mark.parametrize("num_classes", [1, 37, 4096, 9000])
@pytest.mark.parametrize("signal_share", [0.0, 0.5])
@pytest.mark.parametrize("of_marginal", [0.0, 1.0])
def test_the_density_is_that_of_plain_torch(num_classes, signal_share, of_marginal, monkeypatch):
    memory = ClassMemory(num_classes, 0.9)
    memory.squared_signal.uniform_(0, 1e-6)
    memory.marginal.uniform_(0, of_marginal) if of_marginal else None
    expected, found = both(lambda: memory.density(0.1, signal_share), monkeypatch)
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found.total, found.values.sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("num_classes", "num_sampled", "num_tails"), [(50, 7, 1), (600, 300, 3), (9000, 40, 4)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_the_tails_are_those_of_plain_torch(num_classes, num_sampled, num_tails, spread, monkeypatch):
    density = torch.randn(num_classes, dtype=torch.float64).mul(spread).exp()

    def sampled():
        return sample_tails(ClassDensity(density), num_sampled, num_tails, torch.Generator().manual_seed(3))

    expected, found = both(sampled, monkeypatch)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.inclusion, expected.inclusion, rtol=1e-9, atol=0)


def test_the_operations_are_well_formed():
    means, density = (torch.rand(9), torch.rand(9)), torch.rand(9, dtype=torch.float64)
    opcheck(kernels.class_sums, (*means, torch.float64))
    opcheck(kernels.class_density, (*means, kernels.class_sums(*means, torch.float64), [0.4, 0.4, 0.1]))
    opcheck(kernels.tail_scale, (density[:3].sort(descending=True).values, density.sum(), 9))
    scale = torch.tensor([2.0, 0.5], dtype=torch.float64)
    opcheck(kernels.tail_ids, (density.cumsum(0), density, scale, 0.1, 3, 2))
