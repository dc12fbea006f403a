"""RowSparseAdamW against torch's AdamW where they have to agree, and against closed forms where they differ."""

import copy
import io
import math

import pytest
import torch

from hf_dis import RowSparseAdamW
from hf_dis.head import optimizer as row_optimizer
from hf_dis.head.optimizer import gain_of

C, D = 7, 3
SETTINGS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
NO_DECAY = SETTINGS | {"weight_decay": 0.0}
TOUCHED = [[0, 3], [3], [1, 3], [], [0, 1, 2, 3, 4, 5], [0, 6]]  # rows in the gradient of each step
TORCH = [{"foreach": False}, {"foreach": True}, {"fused": True}]
NAMES = ["single", "foreach", "fused"]


def parameters(dtype=torch.float64, seed=0):
    """A weight, a bias, and a parameter outside the head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(C, D), (C,), (4, 2)]
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]


def gradients(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in [(C, D), (C,), (4, 2)]]


def rows_of(gradient, ids):
    """The given rows of a gradient, as a sparse tensor."""
    ids = torch.tensor(ids, dtype=torch.long)
    return torch.sparse_coo_tensor(ids[None], gradient[ids], gradient.shape, is_coalesced=True)


def take_step(optimizer, params, step, ids=None):
    """One step; the first two parameters' gradients hold the rows ``ids`` only, or are dense."""
    weight, bias, other = gradients(step, params[0].dtype)
    if ids is not None:
        weight, bias = rows_of(weight, ids), rows_of(bias, ids)
    for parameter, gradient in zip(params, (weight, bias, other), strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def assert_equal(found, expected, tolerance=1e-14):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("torchs", TORCH, ids=NAMES)
@pytest.mark.parametrize("chunk", [1, 2**17], ids=["row by row", "at once"])
def test_rows_touched_in_every_step_are_adamws(torchs, chunk, monkeypatch):
    """Two parameter groups of different settings, a learning rate that changes."""
    monkeypatch.setattr(row_optimizer, "CHUNK_ELEMENTS", chunk)
    found, expected = parameters(), parameters()
    optimizers = [
        kind([{"params": ps[:1], "weight_decay": 0.1}, {"params": ps[1:], "lr": 0.5}], **SETTINGS, **torchs)
        for kind, ps in ((RowSparseAdamW, found), (torch.optim.AdamW, expected))
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6) for optimizer in optimizers]
    for step in range(6):
        take_step(optimizers[0], found, step, ids=range(C))
        take_step(optimizers[1], expected, step)
        for schedule in schedules:
            schedule.step()
    assert_equal(found, expected)
    assert not torch.allclose(found[0], parameters()[0], atol=0.05)


@pytest.mark.parametrize("torchs", TORCH, ids=NAMES)
def test_dense_gradients_are_stepped_by_torch(torchs):
    found, expected = parameters(), parameters()
    one, other = RowSparseAdamW(found, **SETTINGS, **torchs), torch.optim.AdamW(expected, **SETTINGS, **torchs)
    for step in range(3):
        take_step(one, found, step)
        take_step(other, expected, step)
    assert_equal(found, expected, 0)


def test_untouched_rows_and_their_state_stay_as_they_are():
    params = parameters()
    optimizer = RowSparseAdamW(params, **SETTINGS)
    take_step(optimizer, params, 0, [1, 4])

    def untouched():
        rows = [0, 2, 3, 5, 6]
        tensors = [*params[:2], *(v for p in params[:2] for v in optimizer.state[p].values() if torch.is_tensor(v))]
        return [tensor.detach()[rows].clone() for tensor in tensors]

    before = untouched()
    take_step(optimizer, params, 1, [1, 4])
    take_step(optimizer, params, 2, [4])
    assert_equal(untouched(), before, 0)
    assert torch.equal(params[0].detach()[[0, 2]], parameters()[0].detach()[[0, 2]])


def test_a_row_counts_the_steps_that_it_takes():
    """A row touched at some steps is a parameter of its own that has a gradient at those steps alone."""
    params = parameters()
    optimizer = RowSparseAdamW(params, **NO_DECAY, catch_up=False)
    for step, ids in enumerate(TOUCHED):
        take_step(optimizer, params, step, ids)
    for row in range(C):
        alone = torch.nn.Parameter(parameters()[0].detach()[row].clone())
        reference = torch.optim.AdamW([alone], **NO_DECAY)
        for step, ids in enumerate(TOUCHED):
            if row in ids:
                alone.grad = gradients(step)[0][row]
                reference.step()
        torch.testing.assert_close(params[0].detach()[row], alone.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("gain", [1.0, 1.5])
@pytest.mark.parametrize("times", [1.0, 8.0, 40.0], ids=["all steps", "some steps", "no step"])
def test_a_row_makes_up_for_the_steps_it_missed(times, gain):
    """The row's step has the missed learning rates times the gain, at most 1/d together, at least its own rate."""
    rates = [times * rate for rate in (0.02, 0.005, 0.04, 0.03, 0.01, 0.02)]
    for start, most in zip(parameters()[:2], (1 / D, 1.0), strict=True):
        weight = torch.nn.Parameter(start.detach().clone())
        optimizer, made_up = RowSparseAdamW([weight], **NO_DECAY, gain=gain), []
        for step, ids in enumerate(TOUCHED):
            optimizer.param_groups[0]["lr"] = rates[step]
            weight.grad = rows_of(gradients(step)[weight.dim() == 1], ids)
            optimizer.step()
        for row in range(C):
            alone, since = torch.nn.Parameter(start.detach()[row].clone()), 0
            reference = torch.optim.AdamW([alone], **NO_DECAY)
            for step in (step for step, ids in enumerate(TOUCHED) if row in ids):
                missed = gain * sum(rates[since : step + 1])
                reference.param_groups[0]["lr"] = max(rates[step], min(missed, most))
                made_up.append(missed <= most)
                alone.grad, since = gradients(step)[weight.dim() == 1][row], step + 1
                reference.step()
            torch.testing.assert_close(weight.detach()[row], alone.detach(), rtol=1e-13, atol=1e-14)
        assert weight.dim() == 1 or all(made_up) == (times == 1)


def test_a_state_without_the_sums_of_rates_is_refused():
    params = parameters()[:1]
    optimizer = RowSparseAdamW(params, **SETTINGS)
    params[0].grad = rows_of(gradients(0)[0], [1])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["row_path"]
    with pytest.raises(ValueError, match="lacks the sums of learning rates: load the checkpoint as the student"):
        optimizer.load_state_dict(saved)


def test_a_row_of_a_steady_gradient_keeps_up_with_a_row_of_every_step():
    """Sampled in one step of four with four times the gradient, as an importance weight makes it."""
    weight = torch.nn.Parameter(torch.empty(2, D, dtype=torch.float64))
    for catch_up, expected in ((True, 1.0), (False, 0.25)):
        with torch.no_grad():
            weight.fill_(5.0)
        optimizer = RowSparseAdamW([weight], lr=1e-3, weight_decay=0.0, catch_up=catch_up)
        for step in range(40):
            rows = torch.tensor([[1.0], [4.0]], dtype=torch.float64).expand(2, D)
            weight.grad = rows_of(rows, [0, 1] if step % 4 == 3 else [0])
            optimizer.step()
        every, some = (5.0 - weight.detach()).mean(1)
        assert some / every == pytest.approx(expected, rel=1e-6)


def test_catch_up_and_gain_are_of_the_group_and_are_saved():
    weight, bias, _ = parameters()
    given = [{"params": [weight], "catch_up": False}, {"params": [bias], "gain": 1.5}]
    saved = (optimizer := RowSparseAdamW(given, **SETTINGS, gain=1.2)).state_dict()
    assert [(group["catch_up"], group["gain"]) for group in saved["param_groups"]] == [(False, 1.2), (True, 1.5)]
    for group in saved["param_groups"]:
        del group["gain"]  # as in a state of an earlier version
    optimizer.load_state_dict(saved)
    assert [group["gain"] for group in optimizer.param_groups] == [1.0, 1.0]


@pytest.mark.parametrize("gain", [0.9, math.inf, math.nan])
def test_a_gain_below_one_or_not_finite(gain):
    with pytest.raises(ValueError, match=r"gain is .*1 or more, and finite"):
        RowSparseAdamW(parameters(), gain=gain)


def test_the_gain_falls_to_one_where_an_item_samples_all_classes():
    assert (gain_of(1.0), gain_of(0.2)) == (1.0, 1.2)


@pytest.mark.parametrize("decays", [[0.3] * 5, [0.0, 0.0, 0.3, 0.3, 0.3]], ids=["in all steps", "later"])
def test_a_touched_row_gets_the_decay_of_the_steps_it_missed(decays):
    """With no gradient to speak of: W · Π (1 - lr_t λ_t), over all steps up to the last that touched the row."""
    params = parameters()
    optimizer = RowSparseAdamW(params[:1], **NO_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.2, 3.0, 0.0, 0.5, 1.0][step])
    (group,), factor, expected = optimizer.param_groups, 1.0, torch.ones(C, dtype=torch.float64)
    for ids, group["weight_decay"] in zip([[0], [1, 2], [0, 2], [], [0, 3]], decays, strict=True):
        factor *= 1 - group["lr"] * group["weight_decay"]
        expected[ids] = factor
        params[0].grad = rows_of(torch.zeros(C, D, dtype=torch.float64), ids)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(params[0].detach(), parameters()[0].detach() * expected[:, None], rtol=1e-14, atol=0)
    assert len(expected.unique()) == 4 - (0.0 in decays)


def test_uncoalesced_gradients_are_summed():
    """As accumulation leaves them."""
    found, expected = parameters(), parameters()
    one, other = RowSparseAdamW(found[:1], **SETTINGS), RowSparseAdamW(expected[:1], **SETTINGS)
    gradient = gradients(0)[0]
    found[0].grad = torch.sparse_coo_tensor([[5, 2, 5]], gradient[[0, 1, 2]], (C, D))
    summed = torch.zeros(C, D, dtype=torch.float64).index_add_(0, torch.tensor([5, 2, 5]), gradient[:3])
    expected[0].grad = rows_of(summed, [2, 5])
    one.step()
    other.step()
    assert_equal(found[:1], expected[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("torchs", TORCH, ids=NAMES)
def test_a_loaded_state_goes_on_to_the_bit(torchs, dtype):
    """Through torch.save, with decay outstanding: torch casts state to the parameter's type, which decay outlives."""
    whole = parameters(dtype)
    optimizer = RowSparseAdamW(whole, **SETTINGS, **torchs)
    schedule = [[0, 3], [1, 2], [3], [0, 1, 5], [2, 6], [0, 4]]
    for step, ids in enumerate(schedule[:3]):
        take_step(optimizer, whole, step, ids)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), whole], file)
    file.seek(0)
    state, resumed = torch.load(file, weights_only=False)
    other = RowSparseAdamW(resumed, lr=1.0, **torchs)
    other.load_state_dict(state)
    for step, ids in enumerate(schedule[3:], 3):
        take_step(optimizer, whole, step, ids)
        take_step(other, resumed, step, ids)
    assert_equal(resumed, whole, 0)
    for one, two in zip(whole, resumed, strict=True):
        assert optimizer.state[one].keys() == other.state[two].keys()
        for name, value in optimizer.state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[two][name])), name


def test_a_device_without_float64_keeps_the_sums_in_float32(monkeypatch):
    """As MPS: also where the state comes from a device with float64."""
    expected, found = parameters(torch.float32), parameters(torch.float32)
    wide = RowSparseAdamW(expected, **SETTINGS)
    take_step(wide, expected, 0, [0, 3])
    monkeypatch.setattr(row_optimizer, "widest", lambda device: torch.float32)
    narrow = RowSparseAdamW(found, **SETTINGS)
    take_step(narrow, found, 0, [0, 3])
    loaded = RowSparseAdamW(found, **SETTINGS)
    loaded.load_state_dict(wide.state_dict())
    for optimizer in (narrow, loaded):
        tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    monkeypatch.undo()
    assert wide.state[expected[0]]["row_log_decay"].dtype == torch.float64
    take_step(wide, expected, 1, [2, 3])
    monkeypatch.setattr(row_optimizer, "widest", lambda device: torch.float32)
    take_step(narrow, found, 1, [2, 3])
    assert_equal(found, expected, 1e-6)


def test_the_state_loads_with_weights_only():
    params = parameters()
    optimizer = RowSparseAdamW(params, **SETTINGS)
    take_step(optimizer, params, 0, [1])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["state"].keys() == {0, 1, 2}


def test_closures_and_hooks_run_once():
    """Also after plain AdamW was used in the same process, which puts hooks on the class."""
    torch.optim.AdamW(parameters())
    params = parameters()
    optimizer = RowSparseAdamW(params, **SETTINGS)
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))

    def closure():
        calls.append("closure")
        loss = params[0].sum()
        assert loss.requires_grad
        params[0].grad = rows_of(gradients(0)[0], [1])
        return loss

    loss = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    assert loss.item() == pytest.approx(parameters()[0].sum().item())


@pytest.mark.parametrize("scale", [8.0, float("inf")])
@pytest.mark.parametrize("torchs", TORCH, ids=NAMES)
def test_a_grad_scaler_unscales_and_skips(torchs, scale):
    found, expected = parameters(torch.float32), parameters(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    one, other = RowSparseAdamW(found, **SETTINGS, **torchs), RowSparseAdamW(expected, **SETTINGS, **torchs)
    weight, bias, rest = gradients(0, torch.float32)
    for parameter, gradient in zip(found, (rows_of(weight, [1, 2]), rows_of(bias, [1, 2]), rest), strict=True):
        parameter.grad = gradient * scale
    scaler.step(one)
    if scale == 8:
        take_step(other, expected, 0, [1, 2])
    assert_equal(found, expected, 1e-6)


def test_rows_of_no_gradient_take_no_step():
    params = parameters()
    optimizer = RowSparseAdamW(params, **SETTINGS)
    take_step(optimizer, params, 0, [])
    assert_equal(params[:2], parameters()[:2], 0)
    optimizer.step()  # no gradients at all
    assert_equal(params[:2], parameters()[:2], 0)


@pytest.mark.parametrize("first", [[1], None], ids=["sparse, then dense", "dense, then sparse"])
def test_sparse_and_dense_steps_of_one_parameter_are_refused(first):
    params = parameters()
    optimizer = RowSparseAdamW(params, **SETTINGS)
    take_step(optimizer, params, 0, first)
    with pytest.raises(RuntimeError, match=r"shape \(7, 3\) is (sparse|dense) in this step and was not before"):
        take_step(optimizer, params, 1, [1] if first is None else None)


def test_other_sparse_gradients_are_refused():
    params = parameters()
    params[0].grad = gradients(0)[0].to_sparse()
    with pytest.raises(RuntimeError, match="sparse in 2 dimensions"):
        RowSparseAdamW(params).step()


def test_a_decay_of_everything_is_refused():
    params = parameters()
    optimizer = RowSparseAdamW(params, lr=2.0, weight_decay=0.5)
    with pytest.raises(ValueError, match=r"lr is 2\.0 and weight_decay 0\.5: their product has to be below 1"):
        take_step(optimizer, params, 0, [1])


def test_it_can_be_copied():
    params = parameters()
    optimizer = RowSparseAdamW(params, **SETTINGS)
    take_step(optimizer, params, 0, [1])
    assert copy.deepcopy(optimizer).state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
