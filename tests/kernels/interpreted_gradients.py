"""The gradient of a head by kernels against plain torch. Run by test_kernels.py in Triton's interpreter."""

from itertools import product

import pytest
import torch
from torch.library import opcheck

from hf_dis.head import triton_contributions as kernels
from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.sampling.designs import Updates

# Items, classes, width, own classes, tails and their classes: programs take 256 contributions, or 4,096 classes.
SHAPES = {
    "few": (3, 11, 5, 4, 2, 3),
    "hot classes": (60, 5, 3, 12, 1, 2),
    "many classes": (40, 3000, 2, 110, 2, 40),
    "no tail": (5, 9, 3, 4, 1, 0),
    "no item": (0, 9, 3, 4, 2, 0),
}
UPDATES = {"all": None, "some": 4, "half": 0.5, "more than there are": 10**6}
# The interpreter takes half a minute for the many classes: of them a sample of half, which spans several programs.
CASES = [
    (shape, updates)
    for shape, updates in product(SHAPES, UPDATES)
    if updates in (("all", "half") if shape == "many classes" else UPDATES)
]


def gradients(name, shape, updates, dtype, monkeypatch, start=0.3):
    """Logits, and the gradients of a weighted sum on features, weight and bias."""
    monkeypatch.setenv("HF_DIS_KERNELS", name)
    num_items, num_classes, width, num_own, num_tails, num_shared = shape
    generator = torch.Generator().manual_seed(0)
    of = [(num_items, width), (num_classes, width), (num_classes,)]
    features, weight, bias = (torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in of)
    own = torch.randint(num_classes, (num_items, num_own), generator=generator)
    tails = torch.stack([torch.randperm(num_classes, generator=generator)[:num_shared] for _ in range(num_tails)])
    number = int(updates * num_items * num_own) if updates == 0.5 else updates
    sample = None if updates is None else Updates(number, start)
    logits = sampled_logits(features, weight, bias, own, tails.sort(1).values, True, sample)
    slopes = torch.randn(logits.shape, generator=generator) ** 3
    (logits * slopes).sum().backward()
    return logits.detach(), features.grad, weight.grad, bias.grad


@pytest.mark.parametrize(("shape", "updates"), CASES)
def test_gradients_are_those_of_plain_torch(shape, updates, monkeypatch):
    check(SHAPES[shape], UPDATES[updates], torch.float64, 1e-10, monkeypatch)


@pytest.mark.parametrize("updates", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_any_type(dtype, updates, monkeypatch):
    check(SHAPES["few"], updates, dtype, 8 * torch.finfo(dtype).eps, monkeypatch)


def check(shape, updates, dtype, tolerance, monkeypatch):
    expected, found = (gradients(name, shape, updates, dtype, monkeypatch) for name in ("torch", "triton"))
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype and value.is_sparse == wanted.is_sparse
        if wanted.is_sparse:
            assert torch.equal(value._indices(), wanted._indices())
            value, wanted = value._values(), wanted._values()
        scale = wanted.abs().max().clamp_min(1) if wanted.numel() else 1
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=float(tolerance * scale))


@pytest.mark.parametrize("start", [0.0, 0.25, 0.999])
def test_the_sample_of_the_classes_is_that_of_updates(start):
    """With capped classes, and with classes of no size."""
    sizes = torch.randn(5000).exp() ** 3
    sizes[::7] = 0
    sizes[4000:] = 0
    count = torch.arange(1, 5001).clamp_max(4000)
    for number in (40, 2000, 3999, 4000):
        given = sizes, count, torch.arange(5001), torch.arange(10, 5010)
        kept, kept_ids, weights, found = kernels.kept_classes(*given, number, start, 4, torch.float64)
        starts, ids = given[2:]
        assert torch.equal(kept_ids[: int(found)], ids[starts[kept[: int(found)]]])
        expected = Updates(number, start).weights(sizes, torch.tensor([4000]))
        assert torch.equal(kept[: int(found)], expected.nonzero()[:, 0])
        torch.testing.assert_close(weights[: int(found)].float(), expected[expected != 0], rtol=1e-5, atol=0)


def test_the_operations_are_well_formed():
    in_order, order = torch.tensor([0, 0, 3, 4, 4, 4]), torch.tensor([5, 0, 2, 1, 3, 4])
    grad, lengths = torch.randn(2, 2), torch.rand(4)
    opcheck(kernels.class_starts, (in_order,))
    count, starts = kernels.class_starts(in_order)
    assert count.tolist() == [1, 1, 2, 3, 3, 3] and starts.tolist() == [0, 2, 3, 6, 6, 6, 6]
    opcheck(kernels.sorted_contributions, (order, grad, lengths, torch.float32))
    opcheck(kernels.sorted_contributions, (order, grad, None, torch.float32))
    sizes = torch.rand(6)
    opcheck(kernels.class_sizes, (sizes, starts))
    given = sizes, count, starts, in_order, 3, 0.3, 4, torch.float64
    # Entries beyond the number of the kept classes are unset: no two calls agree on them.
    opcheck(kernels.kept_classes, given, test_utils=("test_schema", "test_faketensor"))
    opcheck(kernels.vector_lengths, (torch.randn(3, 4), torch.randn(2, 4), torch.float32))


def test_classes_of_more_than_a_block_are_numbered():
    in_order = torch.randint(3000, (9000,)).sort().values
    count, starts = kernels.class_starts(in_order)
    classes, places, sizes = in_order.unique_consecutive(return_inverse=True, return_counts=True)
    assert torch.equal(count, places + 1)
    assert torch.equal(starts[: len(classes)], sizes.cumsum(0) - sizes)
    assert starts[len(classes) :].unique().tolist() == [9000]


@pytest.mark.parametrize("width", [3, 700])
def test_lengths_are_those_of_both_matrices(width):
    vectors, others = torch.randn(7, 2 * width)[:, :width], torch.randn(width, 6).mT
    found = kernels.vector_lengths(vectors.bfloat16(), others.bfloat16(), torch.float32)
    wanted = torch.cat([vectors, others]).bfloat16().double().norm(dim=1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
