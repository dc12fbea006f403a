"""Products with sampled rows of W against float64. Run by test_kernels.py in Triton's interpreter."""

import pytest
import torch
from torch.library import opcheck

from hf_dis.head.triton_products import features_gradient, item_products

TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float32),
]
# Items, classes, width, classes per item: blocks are of 32 and 16 classes, and of 128 and 256 columns.
SHAPES = [(1, 1, 1, 1), (3, 11, 5, 17), (2, 40, 300, 35), (4, 7, 256, 32), (0, 7, 3, 2), (3, 7, 3, 0)]


def case(shape, types=(torch.float32, torch.float32)):
    """Features, weight, ids with duplicates, and a gradient of the products."""
    num_items, num_classes, width, num_ids = shape
    features = torch.randn(num_items, width).to(types[0])
    weight = torch.randn(num_classes, width).to(types[1])
    ids = torch.randint(num_classes, (num_items, num_ids))
    return features, weight, ids, torch.randn(num_items, num_ids).to(types[0])


def products(features, weight, ids):
    return torch.einsum("nd,nrd->nr", features, weight[ids])


def assert_close(found, expected, dtype):
    assert found.dtype == dtype
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    scale = expected.abs().max().clamp_min(1) if expected.numel() else 1
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=float(tolerance * scale))


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_their_gradient_are_those_of_float64(shape, types):
    features, weight, ids, scales = case(shape, types)
    wide = features.double().requires_grad_()
    expected = products(wide, weight.double(), ids)
    (gradient,) = torch.autograd.grad(expected, wide, scales.double())
    dtype = torch.float64 if torch.float64 in types else torch.float32
    assert_close(item_products(features, weight, ids), expected.detach(), dtype)
    assert_close(features_gradient(scales, weight, ids), gradient, dtype)


def test_memory_may_be_strided():
    features, weight, ids, scales = case((4, 9, 20, 3))
    expected = products(features.double(), weight.double(), ids), features_gradient(scales, weight, ids).double()
    wider = torch.full((9, 33), torch.nan)
    wider[:, :20] = weight
    strided = {
        "rows apart": (torch.cat([features, features], 1)[:, 20:], wider[:, :20], torch.cat([ids, ids], 1)[:, :3]),
        "columns apart": (features.T.contiguous().T, weight.T.contiguous().T, ids.T.contiguous().T),
        "small ids": (features, weight, ids.int()),
    }
    for name, (one, rows, places) in strided.items():
        assert not (one.is_contiguous() and places.is_contiguous()) or name == "small ids"
        assert_close(item_products(one, rows, places), expected[0], torch.float32)
        assert_close(features_gradient(scales.T.contiguous().T, rows, places), expected[1], torch.float32)


def test_items_may_share_their_classes():
    features, weight, ids, _ = case((4, 9, 20, 3))
    shared = ids[:1].expand(4, 3)
    assert_close(item_products(features, weight, shared), features.double() @ weight[ids[0]].double().T, torch.float32)


def test_a_class_that_does_not_exist_gives_nan_there_alone():
    features, weight, ids, scales = case((3, 9, 20, 3))
    expected, gradient = item_products(features, weight, ids), features_gradient(scales, weight, ids)
    ids[0, 1], ids[2, 2] = -1, 9
    expected[0, 1] = expected[2, 2] = gradient[0] = gradient[2] = torch.nan
    torch.testing.assert_close(item_products(features, weight, ids), expected, equal_nan=True)
    torch.testing.assert_close(features_gradient(scales, weight, ids), gradient, equal_nan=True)


def test_sums_are_of_float32():
    """A sum of bfloat16 would stop growing at 256 times its terms."""
    features = torch.ones(1, 4096, dtype=torch.bfloat16)
    weight = torch.full((2048, 4096), 1e-3, dtype=torch.bfloat16)
    ids = torch.arange(2048)[None]
    term = float(weight[0, 0])
    assert item_products(features, weight, ids[:, :2])[0].tolist() == pytest.approx([4096 * term] * 2, rel=1e-6)
    summed = features_gradient(torch.ones(1, 2048, dtype=torch.bfloat16), weight[:, :8], ids)
    assert summed[0].tolist() == pytest.approx([2048 * term] * 8, rel=1e-6)


def test_the_operations_are_well_formed():
    features, weight, ids, scales = case((3, 9, 20, 3))
    opcheck(item_products, (features, weight, ids))
    opcheck(features_gradient, (scales, weight, ids))
