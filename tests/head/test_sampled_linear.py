"""The product at sampled classes: equal to the full one, in chunks, dense or item-sparse, under autocast."""

import pytest
import torch
from tiny_models import tail_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dis import sampled
from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.sampling.designs import Updates

C, N = 11, 3
ROW_IDS = torch.tensor([[0, 4, 4, 10], [1, 2, 3, 0], [10, 9, 8, 7]])  # with a class twice in an item
SHARED_IDS = torch.tensor([[0, 5, 9]])
TAILS = torch.tensor([[0, 5, 9], [3, 5, 10]])
NO_IDS = torch.empty(1, 0, dtype=torch.long)


def drawn_inputs(dtype=torch.float64, bias=True):
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(N, 5), (C, 5), (C,)]]
    return tensors if bias else [*tensors[:2], None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ids", [(ROW_IDS, SHARED_IDS), (ROW_IDS, TAILS), (ROW_IDS, NO_IDS)])
def test_drawn_logits_gradcheck(ids, bias):
    inputs = drawn_inputs(bias=bias)
    features, weight, bias = inputs
    columns = torch.cat([ROW_IDS, tail_ids(ids[1], N)], 1)
    torch.testing.assert_close(
        sampled_logits(*inputs, *ids), nn.functional.linear(features, weight, bias).gather(1, columns)
    )
    assert torch.autograd.gradcheck(lambda *tensors: sampled_logits(*tensors, *ids), inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients_are_computed(wanted):
    """A frozen head, or frozen features."""
    reference = drawn_inputs()
    frozen = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(reference)]
    for tensors in (reference, frozen):
        sampled_logits(*tensors, ROW_IDS, SHARED_IDS).square().sum().backward()
    for i, (tensor, expected) in enumerate(zip(frozen, reference, strict=True)):
        assert torch.equal(tensor.grad, expected.grad) if i in wanted else tensor.grad is None


@pytest.mark.parametrize("elements", [1, 4 * 5 * 2])
def test_gathering_by_chunks_of_rows_changes_nothing(elements, monkeypatch):
    """As an accelerator does, and a processor where the head is stored column by column."""
    whole = drawn_inputs()
    chunked = [tensor.detach().requires_grad_() for tensor in whole]
    chunked[1] = whole[1].detach().mT.contiguous().mT.requires_grad_()
    expected = sampled_logits(*whole, ROW_IDS, SHARED_IDS)
    expected.square().sum().backward()
    monkeypatch.setattr(sampled, "GATHER_ELEMENTS", elements)
    found = sampled_logits(*chunked, ROW_IDS, SHARED_IDS)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    for one, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("elements", [1, 2**22], ids=["chunked", "whole"])
def test_under_autocast_the_head_computes_in_bfloat16_and_keeps_float32_gradients(elements, monkeypatch):
    monkeypatch.setattr(sampled, "GATHER_ELEMENTS", elements)
    inputs = drawn_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        full = nn.functional.linear(*inputs)
        found = sampled_logits(*inputs, ROW_IDS, SHARED_IDS)
    assert found.dtype == torch.bfloat16
    expected = full.gather(1, torch.cat([ROW_IDS, tail_ids(SHARED_IDS, N)], 1))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    gradients = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    expected.float().square().sum().backward()
    for tensor, gradient in zip(inputs, gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, tensor.grad, rtol=2e-2, atol=2e-2 * float(tensor.grad.abs().max()))


def test_no_gather_exceeds_the_chunk(monkeypatch):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    monkeypatch.setattr(sampled, "GATHER_ELEMENTS", 2 * 16 * 32)
    features, weight = torch.randn(64, 32, requires_grad=True), torch.randn(20, 32, requires_grad=True)
    item_ids = torch.randint(20, (64, 16))
    with Largest() as largest:
        sampled_logits(features, weight, None, item_ids, SHARED_IDS).sum().backward()
    assert (
        largest.elements <= (64 + 3) * 32
    )  # features and the shared classes' items; all gathered items are 64 * 16 * 32


@pytest.mark.parametrize("row_sparse", [True, False])
def test_a_part_of_what_was_drawn_updates_the_head_on_average_as_all_of_it(row_sparse):
    """Half of the classes do: the features' gradient is that of all, the weight's and the bias's are on average."""
    inputs = drawn_inputs()
    with torch.no_grad():
        inputs[0][1] *= 9  # what it adds is certain to be kept

    def gradients(updates):
        logits = sampled_logits(*inputs, ROW_IDS, TAILS, row_sparse, updates)
        found = torch.autograd.grad((logits * slopes).sum(), inputs)
        return [gradient.to_dense() for gradient in found]

    slopes = torch.randn(N, 4 + 3, dtype=torch.float64)
    exact = gradients(None)
    starts = ((torch.arange(2000) + torch.rand(2000)) / 2000).tolist()
    drawn_ones = [gradients(Updates(5, start)) for start in starts]
    for found in drawn_ones:
        assert torch.equal(found[0], exact[0])
        assert len(found[1].count_nonzero(1).nonzero()) == 5
    for place in (1, 2):
        values = torch.stack([found[place] for found in drawn_ones])
        assert values.std(0).max() > 0.2
        torch.testing.assert_close(values.mean(0), exact[place], rtol=0, atol=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_row_sparse_gradients_add_up(bias):
    """Two backward passes with other classes, as accumulation makes them, and under autocast."""
    dense, sparse = drawn_inputs(bias=bias), drawn_inputs(bias=bias)
    samples = [(ROW_IDS, SHARED_IDS), (ROW_IDS[:, :1] * 0 + 6, NO_IDS), (ROW_IDS, TAILS)]
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
            sampled_logits(
                features, weight, bias, torch.randint(5000, (4, 6)), SHARED_IDS, row_sparse
            ).sum().backward()
            torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
        largest[row_sparse] = shapes.elements
    assert largest[True] <= 4 * 6 * 8 + 3 * 8 and largest[False] == 5000 * 8


@pytest.mark.parametrize("row_sparse", [True, False])
@pytest.mark.parametrize("bad", [-1, C])
def test_classes_that_the_head_does_not_have_are_an_error_before_anything_is_computed(bad, row_sparse):
    for ids in ((ROW_IDS.clone().fill_(bad), SHARED_IDS), (ROW_IDS, torch.tensor([[bad]]))):
        with pytest.raises(IndexError, match="index out of range"):
            sampled_logits(*drawn_inputs(), *ids, row_sparse)
