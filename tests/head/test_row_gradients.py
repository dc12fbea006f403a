"""Row-sparse gradients: counted right by clipping, whole again after it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dis.head.row_gradients import TouchedRows, clip_grad_norm_, coalesced
from hf_dis.sampling.designs import Updates


def gradient(ids, size=9):
    ids = torch.tensor(ids)
    return torch.sparse_coo_tensor(ids[None], torch.randn(len(ids), 4), (size, 4))


def test_clipping_counts_every_row_once():
    """Also where accumulation left a row twice: the norm is that of the sum."""
    for ids in ([1, 5, 8], [5, 1, 5]):
        sparse, dense = torch.nn.Parameter(torch.zeros(9, 4)), torch.nn.Parameter(torch.zeros(9, 4))
        sparse.grad = gradient(ids)
        dense.grad = sparse.grad.to_dense()
        norms = [torch.nn.utils.clip_grad_norm_(parameter, 0.5) for parameter in (sparse, dense)]
        torch.testing.assert_close(*norms)
        torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)


def test_clipping_in_place_is_clipping():
    """Several parameters, one of them sparse and one without a gradient: norm and gradients are those of torch."""
    parameters = [torch.nn.Parameter(torch.zeros(9, 4)) for _ in range(3)]
    dense = [torch.nn.Parameter(torch.zeros(9, 4)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = gradient([1, 5, 8]).coalesce(), torch.randn(9, 4)
    dense[0].grad, dense[1].grad = parameters[0].grad.to_dense(), parameters[1].grad.clone()
    values = parameters[0].grad._values()
    norm = clip_grad_norm_(iter(parameters), 0.5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(dense, 0.5))
    for found, expected in zip(parameters[:2], dense, strict=True):
        torch.testing.assert_close(found.grad.to_dense(), expected.grad)
    assert parameters[0].grad.is_coalesced() and parameters[0].grad._values().data_ptr() == values.data_ptr()
    assert parameters[2].grad is None


def test_coalesced_sums_what_is_there_twice_and_only_relabels_what_is_not():
    twice, once = gradient([5, 1, 5]), gradient([1, 5, 8])
    assert coalesced(once).is_coalesced() and coalesced(once)._values().data_ptr() == once._values().data_ptr()
    found = coalesced(twice)
    assert found.is_coalesced() and found.indices().tolist() == [[1, 5]]
    torch.testing.assert_close(found.to_dense(), twice.to_dense())
    assert torch.equal(coalesced(gradient([5, 1])).indices(), torch.tensor([[1, 5]]))
    assert coalesced(gradient([])).is_coalesced()


def test_touched_rows_sum_what_is_contributed_to_each():
    ids, which, scales = torch.tensor([7, 2, 7, 7]), torch.tensor([0, 1, 1, 2]), torch.randn(4)
    vectors = torch.randn(3, 5)
    touched = TouchedRows(ids)
    assert touched.ids.tolist() == [2, 7]
    expected = torch.stack([scales[1] * vectors[1], scales[[0, 2, 3]] @ vectors])
    torch.testing.assert_close(touched.weight_rows(vectors, which, scales), expected)
    torch.testing.assert_close(touched.bias_rows(scales), torch.stack([scales[1], scales[[0, 2, 3]].sum()]))
    some = TouchedRows(ids, torch.tensor([3.0, 1, 0, 0]), Updates(1, 0.7))  # class 7 is met with probability 3/4
    assert some.ids.tolist() == [7] and TouchedRows(ids, torch.ones(4), Updates(2, 0.7)).ids.tolist() == [2, 7]
    torch.testing.assert_close(some.weight_rows(vectors, which, scales), expected[1:] * 4 / 3)
    torch.testing.assert_close(some.bias_rows(scales), scales[[0, 2, 3]].sum()[None] * 4 / 3)
    nothing = TouchedRows(ids[:0])
    assert nothing.weight_rows(vectors, which[:0], scales[:0]).shape == (0, 5) and not len(nothing.ids)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**31)), max_size=40))
def test_touched_rows_are_in_order_whatever_the_ids(ids):
    ids = torch.tensor(ids, dtype=torch.long)
    values = torch.arange(1.0, len(ids) + 1)
    touched = TouchedRows(ids)
    distinct, place = ids.unique(return_inverse=True)
    assert torch.equal(touched.ids, distinct)
    assert torch.equal(touched.bias_rows(values), torch.zeros(len(distinct)).index_add_(0, place, values))
