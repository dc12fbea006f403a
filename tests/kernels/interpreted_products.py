"""Products with sampled rows of W against float64. Run by test_kernels.py in Triton's interpreter."""

import pytest
import torch
from torch.library import opcheck

from hf_dis.head.triton_products import features_gradient, item_products
from hf_dis.kernels import sum_dtype
from hf_dis.models.gathered import gathered
from hf_dis.models.triton_gathered import gathered_rows, placed_rows
from hf_dis.sampling.tails import by_item

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


def own_products(features, weight, ids):
    """The products without those of a tail, in the type of the sums."""
    dtype = sum_dtype(features, weight)
    return item_products(features, weight, ids, features.new_empty(1, len(features), 0), dtype)


def own_gradient(scales, weight, ids):
    return features_gradient(scales, weight, ids, None, sum_dtype(scales, weight))


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
    assert_close(own_products(features, weight, ids), expected.detach(), dtype)
    assert_close(own_gradient(scales, weight, ids), gradient, dtype)


def test_memory_may_be_strided():
    features, weight, ids, scales = case((4, 9, 20, 3))
    expected = products(features.double(), weight.double(), ids), own_gradient(scales, weight, ids).double()
    wider = torch.full((9, 33), torch.nan)
    wider[:, :20] = weight
    strided = {
        "rows apart": (torch.cat([features, features], 1)[:, 20:], wider[:, :20], torch.cat([ids, ids], 1)[:, :3]),
        "columns apart": (features.T.contiguous().T, weight.T.contiguous().T, ids.T.contiguous().T),
        "small ids": (features, weight, ids.int()),
    }
    for name, (one, rows, places) in strided.items():
        assert not (one.is_contiguous() and places.is_contiguous()) or name == "small ids"
        assert_close(own_products(one, rows, places), expected[0], torch.float32)
        assert_close(own_gradient(scales.T.contiguous().T, rows, places), expected[1], torch.float32)


def test_items_may_share_their_classes():
    features, weight, ids, _ = case((4, 9, 20, 3))
    shared = ids[:1].expand(4, 3)
    assert_close(own_products(features, weight, shared), features.double() @ weight[ids[0]].double().T, torch.float32)


def test_a_class_that_does_not_exist_gives_nan_there_alone():
    features, weight, ids, scales = case((3, 9, 20, 3))
    expected, gradient = own_products(features, weight, ids), own_gradient(scales, weight, ids)
    ids[0, 1], ids[2, 2] = -1, 9
    expected[0, 1] = expected[2, 2] = gradient[0] = gradient[2] = torch.nan
    torch.testing.assert_close(own_products(features, weight, ids), expected, equal_nan=True)
    torch.testing.assert_close(own_gradient(scales, weight, ids), gradient, equal_nan=True)


def test_sums_are_of_float32():
    """A sum of bfloat16 would stop growing at 256 times its terms."""
    features = torch.ones(1, 4096, dtype=torch.bfloat16)
    weight = torch.full((2048, 4096), 1e-3, dtype=torch.bfloat16)
    ids = torch.arange(2048)[None]
    term = float(weight[0, 0])
    assert own_products(features, weight, ids[:, :2])[0].tolist() == pytest.approx([4096 * term] * 2, rel=1e-6)
    summed = own_gradient(torch.ones(1, 2048, dtype=torch.bfloat16), weight[:, :8], ids)
    assert summed[0].tolist() == pytest.approx([2048 * term] * 8, rel=1e-6)


@pytest.mark.parametrize(("num_items", "num_tails", "num_shared"), [(5, 2, 3), (7, 3, 1030), (2, 4, 5)])
def test_products_with_tails_stand_beside_them(num_items, num_tails, num_shared):
    """Item i is of tail i mod G; a block is of 1,024 columns."""
    features, weight, ids, scales = case((num_items, 9, 20, 3))
    most = -(-num_items // num_tails)
    tails, added = torch.randn(num_tails, most, num_shared), torch.randn(num_tails, most, 20)
    found = item_products(features, weight, ids, tails, torch.float32)
    expected = torch.cat([own_products(features, weight, ids), by_item(tails, num_items)], 1)
    assert torch.equal(found, expected)
    gradient = features_gradient(scales, weight, ids, added, torch.float32)
    torch.testing.assert_close(gradient, own_gradient(scales, weight, ids) + by_item(added, num_items))
    assert features_gradient(scales, weight, ids, added, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [5, 700])
def test_rows_are_gathered_in_a_type(width, dtype):
    weight, ids = torch.randn(11, width), torch.randint(11, (2, 7))
    found = gathered_rows(weight, ids, dtype)
    assert found.dtype == dtype
    # The interpreter cuts bfloat16 off, where a device rounds.
    torch.testing.assert_close(
        found.double(), weight[ids].double(), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0
    )
    strided = torch.cat([weight, weight], 1)[:, width:]
    assert torch.equal(gathered_rows(strided, ids, dtype), found)
    assert gathered_rows(weight, torch.tensor([3, 11]), dtype)[1].isnan().all()


@pytest.mark.parametrize("ids", [[0, 3, 5, 8, 10], [2], [1, 2, 3, 4, 9], []], ids=str)
@pytest.mark.parametrize("width", [5, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_put_in_their_places_in_a_type(dtype, width, ids):
    ids, rows = torch.tensor(ids, dtype=torch.long), torch.randn(len(ids), 2 * width).bfloat16()[:, :width]
    expected = torch.zeros(11, width, dtype=dtype).index_copy_(0, ids, rows.to(dtype))
    assert torch.equal(placed_rows(rows, ids, 11, dtype), expected)


@pytest.mark.parametrize("num_items", [0, 3])
def test_vectors_of_items_have_the_gradient_of_an_index(num_items, monkeypatch):
    vectors, positions = torch.randn(6, 5, requires_grad=True), torch.tensor([1, 2, 5])[:num_items]
    slopes = torch.randn(num_items, 5)
    gradients = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("HF_DIS_KERNELS", name)
        gradients += torch.autograd.grad(gathered(vectors, positions), vectors, slopes)
    assert torch.equal(*gradients)


def test_the_operations_are_well_formed():
    features, weight, ids, scales = case((3, 9, 20, 3))
    opcheck(item_products, (features, weight, ids, torch.randn(2, 2, 4), torch.bfloat16))
    opcheck(features_gradient, (scales, weight, ids, torch.randn(2, 2, 20), torch.bfloat16))
    opcheck(features_gradient, (scales, weight, ids, None, torch.float32))
    opcheck(gathered_rows, (weight, ids, torch.bfloat16))
    opcheck(placed_rows, (weight[:2], torch.tensor([1, 4]), 9, torch.bfloat16))
