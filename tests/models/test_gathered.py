"""The vectors of the items, gathered in the type of the product."""

import pytest
import torch

from hf_dis.models.gathered import gathered

POSITIONS = torch.tensor([0, 2, 4])


def test_vectors_and_gradients_are_those_of_an_index():
    vectors = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(gathered(vectors, POSITIONS), vectors[POSITIONS])
    assert torch.autograd.gradcheck(lambda tensor: gathered(tensor, POSITIONS), [vectors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_type_is_that_of_a_linear_layer(dtype):
    vectors = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = gathered(vectors, POSITIONS)
    assert torch.equal(found, vectors[POSITIONS].bfloat16())
    slopes = torch.randn(3, 5).bfloat16()
    found.backward(slopes)
    assert vectors.grad.dtype == dtype and torch.equal(vectors.grad[POSITIONS], slopes.to(dtype))
    assert not vectors.grad[[1, 3, 5]].any()


def test_no_item():
    vectors = torch.randn(6, 5, requires_grad=True)
    gathered(vectors, POSITIONS[:0]).sum().backward()
    assert not vectors.grad.any()
