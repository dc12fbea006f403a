"""The product at sampled classes: equal to the full one, in chunks, dense or row-sparse, in every type."""

import pytest
import torch
from tiny_models import tails_of_items
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dis.head import sampled_linear
from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.sampling.designs import Updates

C, N = 11, 3
ITEM_IDS = torch.tensor([[0, 4, 4, 10], [1, 2, 3, 0], [10, 9, 8, 7]])  # with a class twice in an item
TAIL_IDS = torch.tensor([[0, 5, 9]])
TAILS = torch.tensor([[0, 5, 9], [3, 5, 10]])
NO_IDS = torch.empty(1, 0, dtype=torch.long)


def random_inputs(dtype=torch.float64, bias=True):
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(N, 5), (C, 5), (C,)]]
    return tensors if bias else [*tensors[:2], None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ids", [(ITEM_IDS, TAIL_IDS), (ITEM_IDS, TAILS), (ITEM_IDS, NO_IDS)])
def test_sampled_logits_gradcheck(ids, bias):
    inputs = random_inputs(bias=bias)
    features, weight, bias = inputs
    columns = torch.cat([ITEM_IDS, tails_of_items(ids[1], N)], 1)
    torch.testing.assert_close(
        sampled_logits(*inputs, *ids), nn.functional.linear(features, weight, bias).gather(1, columns)
    )
    assert torch.autograd.gradcheck(lambda *tensors: sampled_logits(*tensors, *ids), inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients_are_computed(wanted):
    """A frozen head, or frozen features."""
    reference = random_inputs()
    frozen = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(reference)]
    for tensors in (reference, frozen):
        sampled_logits(*tensors, ITEM_IDS, TAIL_IDS).square().sum().backward()
    for i, (tensor, expected) in enumerate(zip(frozen, reference, strict=True)):
        assert torch.equal(tensor.grad, expected.grad) if i in wanted else tensor.grad is None


@pytest.mark.parametrize("elements", [1, 4 * 5 * 2])
def test_gathering_by_chunks_of_items_changes_nothing(elements, monkeypatch):
    """As an accelerator does, and a processor where the head is stored column by column."""
    whole = random_inputs()
    chunked = [tensor.detach().requires_grad_() for tensor in whole]
    chunked[1] = whole[1].detach().mT.contiguous().mT.requires_grad_()
    expected = sampled_logits(*whole, ITEM_IDS, TAIL_IDS)
    expected.square().sum().backward()
    monkeypatch.setattr(sampled_linear, "GATHER_ELEMENTS", elements)
    found = sampled_logits(*chunked, ITEM_IDS, TAIL_IDS)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    for one, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("elements", [1, 2**22], ids=["chunked", "whole"])
def test_under_autocast_the_head_computes_in_bfloat16_and_keeps_float32_gradients(elements, monkeypatch):
    monkeypatch.setattr(sampled_linear, "GATHER_ELEMENTS", elements)
    inputs = random_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        full = nn.functional.linear(*inputs)
        found = sampled_logits(*inputs, ITEM_IDS, TAIL_IDS)
    assert found.dtype == torch.bfloat16
    expected = full.gather(1, torch.cat([ITEM_IDS, tails_of_items(TAIL_IDS, N)], 1))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    gradients = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    expected.float().square().sum().backward()
    for tensor, gradient in zip(inputs, gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, tensor.grad, rtol=2e-2, atol=2e-2 * float(tensor.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_gather_exceeds_the_chunk(dtype, monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr(sampled_linear, "GATHER_ELEMENTS", 2 * 16 * 32)
    features, weight = (torch.randn(size, 32, dtype=dtype, requires_grad=True) for size in (64, 20))
    item_ids = torch.randint(20, (64, 16))
    with Largest() as largest:
        sampled_logits(features, weight, None, item_ids, TAIL_IDS).sum().backward()
    # The features and the rows of the tail; all gathered rows are 64 * 16 * 32.
    assert largest.elements <= (64 + 3) * 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_products_of_a_gpu_are_those_of_gathered_rows(dtype):
    """Classes may repeat in an item; features of a narrower type than W are widened."""
    features, weight, _ = random_inputs()
    features, weight = features.to(dtype), weight.to(torch.promote_types(dtype, torch.float32))
    item_ids = torch.tensor([[0, 10, 10], [4, 4, 4], [7, 2, 0]])
    numbers, _ = sampled_linear._numbers(item_ids, item_ids[:0])
    found = sampled_linear._bag_products(features, weight, item_ids, numbers)
    assert found.dtype == weight.dtype
    torch.testing.assert_close(found, (weight[item_ids] * features[:, None].to(weight.dtype)).sum(2))


@pytest.mark.parametrize("features", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_products_of_a_gpu_round_no_factor(features, weight):
    takes = sampled_linear._bags_take(torch.empty(1, 1, dtype=features), torch.empty(1, 1, dtype=weight))
    wide = torch.promote_types(features, torch.float32)
    assert takes == (weight == torch.promote_types(wide, weight))


# bfloat16 throughout: a running sum of equal terms stops growing at 256 of them

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("row_sparse", [True, False])
@pytest.mark.parametrize("column", [0, 1], ids=["of the item", "of the tail"])
@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_head_sums_its_gradients_in_float32(name, column, row_sparse):
    """4,096 terms of 1e-3 are 4.096: a sum in bfloat16 gives 0.5."""
    num_items, dtype = 4096, NARROW[name]
    features = torch.ones(num_items, 8, dtype=dtype)
    weight, bias = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in [(C, 8), (C,)])
    ids = torch.full((num_items, 1), 3), torch.tensor([[5]])
    slopes = torch.zeros(num_items, 2, dtype=dtype)
    slopes[:, column] = 1e-3
    sampled_logits(features, weight, bias, *ids, row_sparse).backward(slopes)
    for parameter in (weight, bias):
        gradient = parameter.grad.to_dense()
        assert parameter.grad.is_sparse == row_sparse and gradient.dtype == dtype
        expected = torch.zeros_like(gradient, dtype=torch.float64)
        expected[5 if column else 3] = num_items * float(slopes[0, column])
        torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_narrow_head_measures_what_to_update_in_float32():
    """Class 3 with 4,096 parts of 1e-3 has 4 of 5 shares of the sample; were it 0.5, it would have 1 of 3."""
    features = torch.ones(4097, 1, dtype=torch.bfloat16)
    weight, bias = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in [(C, 1), (C,)])
    item_ids, slopes = torch.full((4097, 1), 3), torch.full((4097, 1), 1e-3, dtype=torch.bfloat16)
    item_ids[-1], slopes[-1] = 7, 1
    sampled_logits(features, weight, bias, item_ids, NO_IDS, True, Updates(1, 0.3)).backward(slopes)
    for parameter in (weight, bias):
        assert parameter.grad._indices().tolist() == [[3]] and parameter.grad.dtype == torch.bfloat16
        torch.testing.assert_close(float(parameter.grad._values()), 4.096 / (4.096 / 5.096), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_logits_are_summed_in_float32(name):
    """Products that cancel: the logits are those of float64 but for one rounding."""
    features, weight = (torch.randn(size, 1024).to(NARROW[name]) for size in (5, C))
    ids = torch.randint(C, (5, 4))
    found = sampled_logits(features, weight, None, ids, NO_IDS)
    expected = (features.double() @ weight.double().mT).gather(1, ids)
    assert found.dtype == NARROW[name]
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(found.dtype).eps / 2, atol=1e-4)


@pytest.mark.parametrize("row_sparse", [True, False])
def test_a_part_of_the_sampled_classes_updates_the_head_on_average_as_all_of_them(row_sparse):
    """Half of the classes: the features' gradient is that of all, those of weight and bias are on average."""
    inputs = random_inputs()
    with torch.no_grad():
        inputs[0][1] *= 9  # what it adds is certain to be kept

    def gradients(updates):
        logits = sampled_logits(*inputs, ITEM_IDS, TAILS, row_sparse, updates)
        found = torch.autograd.grad((logits * slopes).sum(), inputs)
        return [gradient.to_dense() for gradient in found]

    slopes = torch.randn(N, 4 + 3, dtype=torch.float64)
    exact = gradients(None)
    starts = ((torch.arange(2000) + torch.rand(2000)) / 2000).tolist()
    sampled = [gradients(Updates(5, start)) for start in starts]
    for found in sampled:
        assert torch.equal(found[0], exact[0])
        assert len(found[1].count_nonzero(1).nonzero()) == 5
    for place in (1, 2):
        values = torch.stack([found[place] for found in sampled])
        assert values.std(0).max() > 0.2
        torch.testing.assert_close(values.mean(0), exact[place], rtol=0, atol=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_row_sparse_gradients_add_up(bias):
    """Two backward passes with other classes, as accumulation makes them, and under autocast."""
    dense, sparse = random_inputs(bias=bias), random_inputs(bias=bias)
    samples = [(ITEM_IDS, TAIL_IDS), (ITEM_IDS[:, :1] * 0 + 6, NO_IDS), (ITEM_IDS, TAILS)]
    for tensor, other in zip(sparse, dense, strict=True):
        if tensor is not None:
            tensor.data = other.data.clone()
    for ids in samples:
        for tensors, row_sparse in ((dense, False), (sparse, True)):
            sampled_logits(*tensors, *ids, row_sparse).square().sum().backward()
    for tensor, other in zip(sparse[1 : 2 + bias], dense[1:], strict=False):
        assert tensor.grad.is_sparse and not other.grad.is_sparse
        torch.testing.assert_close(tensor.grad.to_dense(), other.grad, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_size_of_the_head_is_made_for_row_sparse_gradients():
    class Shapes(TorchDispatchMode):
        def __init__(self, weight):
            super().__init__()
            self.elements, self.weight = 0, weight.untyped_storage().data_ptr()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                is_strided = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
                if is_strided and tensor.untyped_storage().data_ptr() != self.weight:
                    self.elements = max(self.elements, tensor.numel())
            return result

    largest = {}
    for row_sparse in (True, False):
        features, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
        bias = torch.zeros(5000, requires_grad=True)
        with Shapes(weight) as shapes:
            sampled_logits(features, weight, bias, torch.randint(5000, (4, 6)), TAIL_IDS, row_sparse).sum().backward()
            torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        largest[row_sparse] = shapes.elements
    assert largest[True] <= 4 * 6 * 8 + 3 * 8 and largest[False] == 5000 * 8


@pytest.mark.parametrize("row_sparse", [True, False])
@pytest.mark.parametrize("bad", [-1, C])
def test_classes_that_the_head_does_not_have_are_an_error_before_anything_is_computed(bad, row_sparse):
    for ids in ((ITEM_IDS.clone().fill_(bad), TAIL_IDS), (ITEM_IDS, torch.tensor([[bad]]))):
        with pytest.raises(IndexError, match="index out of range"):
            sampled_logits(*random_inputs(), *ids, row_sparse)


def test_tails_of_no_item_are_left_out():
    """A class outside the tails of all items is not touched: a lazy optimizer would move its row."""
    features, weight = torch.randn(2, 5), nn.Parameter(torch.randn(C, 5))
    tail_ids = torch.tensor([[0, 1], [1, 2], [3, 4]])
    sampled_logits(features, weight, None, NO_IDS.expand(2, 0), tail_ids, row_sparse=True).sum().backward()
    assert weight.grad.coalesce().indices().tolist() == [[0, 1, 2]]
