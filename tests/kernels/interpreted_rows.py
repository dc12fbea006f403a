"""Sums of rows, and steps of RowSparseAdamW, against float64 and plain torch. Run by test_kernels.py."""

import copy

import pytest
import torch
from torch.library import opcheck

from hf_dis import RowSparseAdamW
from hf_dis.head import triton_adamw
from hf_dis.head.triton_adamw import row_factors, step_rows
from hf_dis.head.triton_rows import PIECE, join_pieces, segment_pieces, segment_rows

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Contributions per segment; a piece is of 64.
COUNTS = {
    "one": [1],
    "none": [],
    "empty segments": [0, 0, 3, 0, 5, 0],
    "a whole piece": [64],
    "just above": [1, 64, 65, 63],
    "hot": [2, 300, 0, 1, 129, 64, 64, 7],
    "hot at the end": [1] * 30 + [200],
}


@pytest.fixture(autouse=True)
def unset_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(counts, width=5, dtype=torch.float32):
    """Vectors, contributions with duplicates, and the starts of the segments."""
    vectors = torch.randn(9, width).to(dtype)
    which = torch.randint(9, (sum(counts),))
    starts = torch.tensor([0, *counts]).cumsum(0)
    return vectors, which, torch.randn(sum(counts)).to(dtype), starts


def sums(vectors, which, scales, starts):
    lengths = starts.diff()
    places = torch.arange(len(lengths)).repeat_interleave(lengths)
    out = torch.zeros(len(lengths), vectors.shape[1], dtype=torch.float64)
    return out.index_add_(0, places, scales.double()[:, None] * vectors.double()[which])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_sums_are_those_of_float64(counts, dtype):
    given = case(counts, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = segment_rows(*given, wide)
    assert found.dtype == wide
    torch.testing.assert_close(found.double(), sums(*given), rtol=1e-5, atol=1e-5 * PIECE)


def test_the_type_of_the_rows_is_the_one_asked_for():
    """The interpreter cuts bfloat16 off, where a device rounds."""
    given = case([3, 70], dtype=torch.bfloat16)
    found = segment_rows(*given, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), sums(*given), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("width", [1, 512, 700])
def test_any_width(width):
    """A block is of 512 columns."""
    given = case([3, 70, 200], width)
    torch.testing.assert_close(segment_rows(*given, torch.float64), sums(*given), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_segments_of_any_length(seed):
    torch.manual_seed(seed)
    lengths = torch.tensor([0, 1, 2, 5, 30, 63, 64, 65, 150])
    counts = lengths[torch.randint(len(lengths), (12,))].tolist()
    given = case(counts, 2)
    torch.testing.assert_close(segment_rows(*given, torch.float64), sums(*given), rtol=1e-5, atol=1e-4)


def test_a_piece_of_several_segments_is_not_summed():
    vectors, which, scales, starts = case([64, 30, 34, 10, 64])
    pieces = segment_pieces(vectors, which, scales, starts)
    assert [bool(piece.isnan().any()) for piece in pieces] == [False, True, True]


def test_types_may_differ_and_memory_may_be_strided():
    vectors, which, scales, starts = case([3, 70])
    apart = torch.cat([vectors, vectors], 1)[:, 5:].bfloat16()
    found = segment_rows(apart, which, scales, starts, torch.float32)
    torch.testing.assert_close(found.double(), sums(apart, which, scales, starts), rtol=1e-5, atol=1e-4)
    assert torch.equal(segment_rows(apart.T.contiguous().T, which, scales, starts, torch.float32), found)


@pytest.mark.parametrize("first", [0, 4, 9])
def test_vectors_may_lie_in_two_tensors(first):
    vectors, which, scales, starts = case([3, 70, 0, 128])
    apart = torch.cat([vectors[first:]] * 2, 1)[:, 5:]
    found = segment_rows(vectors[:first], which, scales, starts, torch.float32, others=apart)
    assert torch.equal(found, segment_rows(vectors, which, scales, starts, torch.float32))


def test_a_hot_class_is_summed_in_float32():
    """1,024 terms of 1e-3: a sum of bfloat16 stops at 0.5."""
    vectors = torch.ones(1, 3, dtype=torch.bfloat16)
    which, scales = torch.zeros(1024, dtype=torch.long), torch.full((1024,), 1e-3)
    found = segment_rows(vectors, which, scales, torch.tensor([0, 1024]), torch.float32)
    assert found[0].tolist() == pytest.approx([1.024] * 3, rel=1e-6)


# AdamW


# Numbers that float32 holds: the interpreter rounds a kernel's numbers to it, and a compiled kernel does not.
SETTINGS = {"lr": 2**-6, "betas": (0.75, 0.9375), "eps": 2**-20, "weight_decay": 0.25}
TOUCHED = [[0, 3], [3], [1, 3], [], [0, 1, 2, 3, 4, 5], [0, 6]]


def stepped(kernels, shape, dtype, monkeypatch, **settings):
    """The parameter and its state after the steps of TOUCHED, under a schedule that touches decay too."""
    monkeypatch.setenv("HF_DIS_KERNELS", kernels)
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = RowSparseAdamW([parameter], **SETTINGS | settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1, 0.25, 2, 0, 0.5, 1, 1][step])
    for ids in TOUCHED:
        rows = torch.randn(len(ids), *shape[1:], generator=generator).to(dtype)
        places = torch.tensor([ids], dtype=torch.long)
        parameter.grad = torch.sparse_coo_tensor(places, rows, shape, is_coalesced=True)
        optimizer.step()
        schedule.step()
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 3), (7,), (7, 1100), (7, 2, 3)], ids=str)
def test_steps_are_those_of_torch(shape, dtype, monkeypatch):
    # In plain torch a float16 moment below 2^-24 is 0 within its step; a large eps hides the difference.
    eps = 2**-6 if dtype == torch.float16 else SETTINGS["eps"]
    (expected, plain), (found, state) = (
        stepped(name, shape, dtype, monkeypatch, eps=eps) for name in ("torch", "triton")
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert found.dtype == dtype and (found - stepped_not_at_all(shape, dtype)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], plain[name], rtol=tolerance, atol=tolerance)
    assert torch.equal(state["step"], plain["step"]) and state["log_decay"] == plain["log_decay"]
    for name in ("row_log_decay", "row_path"):
        assert torch.equal(state[name], plain[name])


def stepped_not_at_all(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    "settings", [{"betas": (0.0, 0.9375)}, {"betas": (0.75, 0.0)}, {"weight_decay": 0.0}], ids=str
)
def test_settings_of_zero(settings, monkeypatch):
    expected, found = (
        stepped(name, (7, 3), torch.float64, monkeypatch, **settings)[0] for name in ("torch", "triton")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_more_rows_than_a_block(monkeypatch):
    """A block is of 256 rows for the factors, and of 1,024 for a bias."""
    ids = torch.arange(1, 2400, 2)
    results = []
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("HF_DIS_KERNELS", kernels)
        bias = torch.nn.Parameter(torch.linspace(-1, 1, 2400))
        bias.grad = torch.sparse_coo_tensor(ids[None], torch.linspace(1, 2, len(ids)), (2400,), is_coalesced=True)
        optimizer = RowSparseAdamW([bias], **SETTINGS)
        optimizer.step()
        results.append((bias.detach(), optimizer.state[bias]["step"]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[1][0][::2], torch.linspace(-1, 1, 2400)[::2])


def test_a_transposed_parameter_is_stepped_by_torch(monkeypatch):
    monkeypatch.setattr(triton_adamw, "adamw", None)
    parameter = torch.nn.Parameter(torch.ones(3, 7).T)
    parameter.grad = torch.sparse_coo_tensor([[2]], torch.ones(1, 3), (7, 3), is_coalesced=True)
    RowSparseAdamW([parameter], **SETTINGS).step()
    assert (parameter != 1).any(1).tolist() == [False, False, True, *[False] * 4]


def test_the_operations_are_well_formed():
    given = case([64])
    opcheck(segment_pieces, given)
    opcheck(join_pieces, (*given, segment_pieces(*given), torch.float32))
    ids, weight = torch.tensor([1, 4]), torch.randn(7, 3)
    of_rows = torch.zeros(7), *torch.zeros(2, 7, dtype=torch.float64).unbind()
    betas = [0.75, 0.9375]
    others = ids, betas, 1e-8, [-0.5, 0.3], [0.1, 0.2], torch.float32
    opcheck(row_factors, (*map(torch.clone, of_rows), *others))
    factors = list(row_factors(*of_rows, *others))
    moments = [torch.zeros(7, 3), torch.zeros(7, 3)]
    opcheck(step_rows, (copy.copy(weight), *moments, ids, torch.randn(2, 3), factors, betas))
