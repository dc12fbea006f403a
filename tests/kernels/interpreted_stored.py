"""Stored targets and their samples against plain torch. Run by test_kernels.py in Triton's interpreter."""

from dataclasses import fields

import pytest
import torch
from torch.library import opcheck

from hf_dis import SamplerSpec
from hf_dis.kernels import VARIABLE
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.sampling.triton_cached import assemble_stored
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import TargetLayout, compact_targets
from hf_dis.teacher.triton_stored import stored_columns, unpack_targets

# Classes, m, T: ids of 1 to 20 bits, of any alignment.
LAYOUTS = [(2, 1, 1), (50, 6, 8), (300, 0, 5), (300, 7, 0), (1000, 3, 30), (2**20, 2, 19)]


def packed(layout, scale=3.0, num_items=5):
    logits = scale * torch.randn(num_items, layout.num_classes)
    targets = compact_targets(logits, 2.0, layout.depth, layout.sample_size, torch.Generator().manual_seed(2))
    return layout.pack(targets)


def both(function, monkeypatch):
    results = []
    for name in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, name)
        results.append(function())
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("scale", [0.5, 60.0])
def test_targets_are_unpacked_as_by_plain_torch(layout, scale, monkeypatch):
    layout = TargetLayout(*layout)
    monkeypatch.setenv(VARIABLE, "torch")
    stored = packed(layout, scale)
    stored = torch.cat([stored, stored], 1)[:, : layout.item_bytes]  # memory may be strided
    for expected, found in zip(*both(lambda: layout.unpack(stored), monkeypatch), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    expected, found = both(lambda: CachedTargets(layout.unpack(stored), layout.num_classes), monkeypatch)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.used, expected.used)
    torch.testing.assert_close(found.target, expected.target, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.class_mass(), expected.class_mass(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_bits_of_id", [1, 8, 25, 33])
def test_ids_of_any_number_of_bits(num_bits_of_id, monkeypatch):
    layout = TargetLayout(2**num_bits_of_id, 3, 4)
    stored = torch.randint(256, (6, layout.item_bytes), dtype=torch.uint8)
    expected, found = both(lambda: layout.unpack(stored), monkeypatch)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.stored_ids, expected.stored_ids)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("depth", "sample_size", "num_sampled"), [(6, 8, 8), (6, 8, 3), (0, 5, 5)])
@pytest.mark.parametrize("num_tails", [1, 3])
def test_a_sample_is_that_of_plain_torch(depth, sample_size, num_sampled, num_tails, labelled, monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    layout = TargetLayout(50, depth, sample_size)
    stored = packed(layout)
    spec = SamplerSpec(num_sampled_classes=num_sampled, num_shared_classes=12, num_tails=num_tails)
    labels = torch.randint(50, (len(stored),)) if labelled else None
    if labelled and depth:
        labels[0] = layout.unpack(stored).ids[0, 1]

    def sampled():
        sampler = make_cached_sampler(layout, spec, seed=4)
        return sampler.sample([CachedTargets(layout.unpack(stored), 50)], labels)

    expected, found = both(sampled, monkeypatch)
    for field in fields(expected):
        wanted, value = getattr(expected, field.name), getattr(found, field.name)
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, f=field: f"{f.name}: {m}")
        else:
            assert value == wanted


def test_the_operations_are_well_formed(monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    layout = TargetLayout(50, 3, 4)
    stored = packed(layout)
    opcheck(unpack_targets, (stored, 3, 4, layout.id_bits))
    targets = unpack_targets(stored, 3, 4, layout.id_bits)
    opcheck(stored_columns, (*targets[:5], -80.0))
    columns = stored_columns(*targets[:5], -80.0)
    tails, inclusion = torch.tensor([[1, 5], [2, 9]]), torch.full((2, 2), 0.5, dtype=torch.float64)
    for labels in (torch.randint(50, (5,)), None):
        opcheck(assemble_stored, (*columns, tails, inclusion, labels, -80.0))
