"""Moments of a row-sparse weight in host memory and in other types: the same steps, or the same in expectation."""

import copy
import io
import logging
from unittest import mock

import pytest
import torch
from fake_cuda import fake_cuda
from test_optimizer import SETTINGS, assert_equal, parameters, take_step

from hf_dis import RowSparseAdamW, kernels
from hf_dis.head import optimizer as row_optimizer
from hf_dis.head.moments import random_bits, rounded

TOUCHED = [[0, 3], [1, 2], [3], [], [0, 1, 5], [2, 6]]
ROWS, WIDTH, IN_A_STEP = 100_000, 256, 1000
BFLOAT16, FLOAT32 = {"moment_dtype": torch.bfloat16}, {"moment_dtype": torch.float32}


def trained(touched=TOUCHED, dtype=torch.float64, start=None, state=None, first=0, **settings):
    """The parameters after steps, and their optimizer."""
    params = start or parameters(dtype)
    optimizer = RowSparseAdamW(params, **SETTINGS, **settings)
    if state is not None:
        optimizer.load_state_dict(state)
    for step, ids in enumerate(touched, first):
        take_step(optimizer, params, step, ids)
    return params, optimizer


@pytest.fixture
def apart(monkeypatch):
    """Treats the processor's memory as that of an accelerator, beside which host memory is a place of its own."""
    monkeypatch.setattr(
        row_optimizer, "lie_in_host_memory", lambda parameter, offload: offload and parameter.dim() > 1
    )


@pytest.mark.parametrize("chunk", [1, 2**17], ids=["row by row", "at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_that_travel_are_stepped_as_rows_that_stay(apart, dtype, chunk, monkeypatch):
    monkeypatch.setattr(row_optimizer, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(row_optimizer, "ACCELERATOR_CHUNK_ELEMENTS", chunk)
    stay, travel = trained(dtype=dtype), trained(dtype=dtype, offload_moments=True)
    assert_equal(travel[0], stay[0], 0)
    for one, other in zip(stay[0], travel[0], strict=True):
        for name, value in stay[1].state[one].items():
            assert torch.equal(torch.as_tensor(travel[1].state[other][name]), torch.as_tensor(value)), name
    assert not torch.equal(stay[0][0], parameters(dtype)[0])


def test_on_a_processor_it_changes_nothing():
    assert_equal(trained(offload_moments=True)[0], trained()[0], 0)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_state_goes_on_with_or_without_it(apart, saved, loaded):
    start, optimizer = trained(TOUCHED[:3], offload_moments=saved)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), start], file)
    file.seek(0)
    state, start = torch.load(file, weights_only=False)
    found, resumed = trained(TOUCHED[3:], start=start, state=state, first=3, offload_moments=loaded)
    assert_equal(found, trained()[0], 0)
    assert resumed.defaults["offload_moments"] == loaded


def a_step(counts, optimizer, weight, bias):
    ids = torch.empty(1, IN_A_STEP, dtype=torch.long, device="cuda")
    for parameter in (weight, bias):
        rows = torch.empty(IN_A_STEP, *parameter.shape[1:], device="cuda")
        parameter.grad = torch.sparse_coo_tensor(ids, rows, parameter.shape, is_coalesced=True)
    counts.start()
    optimizer.step()


def counted(then=lambda counts, optimizer, params: None, obstacle="torch", **settings):
    """Waits, the most bytes held on the device, bytes of the way, and the moments' devices, of the second step."""
    with mock.patch("hf_dis.kernels.obstacle", lambda device: obstacle), fake_cuda() as counts:
        weight = torch.nn.Parameter(torch.empty(ROWS, WIDTH, device="cuda"))
        bias = torch.nn.Parameter(torch.empty(ROWS, device="cuda"))
        optimizer = RowSparseAdamW([weight, bias], **SETTINGS, **settings)
        for _ in range(2):
            a_step(counts, optimizer, weight, bias)
        waits = {place: number for place, number in counts.waits.items() if number}
        places = [optimizer.state[one]["exp_avg"].device.type for one in (weight, bias)]
        counters = optimizer.state[weight]["row_path"].device.type
        after = then(counts, optimizer, (weight, bias))
        return sum(waits.values()), counts.peak(), [*places, counters], after


def test_the_host_waits_for_the_ids_and_for_the_rows_alone():
    assert counted()[0] == 0
    assert counted(offload_moments=True)[0] == 2


def test_the_moments_of_a_weight_lie_in_host_memory():
    """Those of a bias are smaller than the counters of its rows, and stay."""
    assert counted()[2] == ["cuda", "cuda", "cuda"]
    assert counted(offload_moments=True)[2] == ["cpu", "cuda", "cuda"]


def test_the_device_holds_the_rows_of_a_step_alone():
    _, peak, _, _ = counted(offload_moments=True)
    rows = 4 * IN_A_STEP * WIDTH
    assert rows < peak < 8 * rows < 4 * ROWS * WIDTH


def test_no_row_beside_those_of_the_step_is_copied(monkeypatch):
    copied, own = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        found = own(tensor, *args, **kwargs)
        if tensor.device.type == "cpu" and found.device.type == "cuda":
            copied.append(tensor.numel())
        return found

    monkeypatch.setattr(torch.Tensor, "to", to)
    counted(offload_moments=True)
    assert copied == 2 * [2 * IN_A_STEP * WIDTH]


@pytest.mark.parametrize("offload", [False, True])
def test_a_loaded_state_lies_where_a_step_reads_it(offload):
    def reload(counts, optimizer, params):
        other = RowSparseAdamW(params, **SETTINGS, offload_moments=offload)
        other.load_state_dict(optimizer.state_dict())
        a_step(counts, other, *params)
        return [other.state[one]["exp_avg_sq"].device.type for one in params]

    for before in (False, True):
        *_, found = counted(reload, offload_moments=before)
        assert found == ["cpu" if offload else "cuda", "cuda"]


def test_kernels_leave_rows_that_travel_to_torch(monkeypatch):
    told = []
    kernels.tell_once.cache_clear()
    monkeypatch.setattr(kernels.logger, "log", lambda level, message: told.append((level, message)))
    waits, *_ = counted(offload_moments=True, obstacle=None)
    assert waits == 2
    assert (logging.INFO, "optimizer: torch steps rows with moments in host memory, or rounded at random") in told
    kernels.tell_once.cache_clear()


# Moments in other types


def bits_of(number, width=64, step=1):
    ids = torch.arange(number)
    return random_bits(ids, torch.full((number,), float(step)), torch.Size([width]))


def test_the_random_bits_are_uniform_and_independent():
    """Of rows, steps, columns and both moments; bounds of five standard deviations."""
    first, second = bits_of(2048)
    count = first.numel()
    for bits in (first, second):
        assert bits.min() >= 0 and bits.max() < 2**16
        for bit in range(16):
            share = (bits >> bit).bitwise_and(1).double().mean()
            assert abs(share - 0.5) < 5 * 0.5 / count**0.5
    pairs = {
        "moments": (first, second),
        "steps": (first, bits_of(2048, step=2)[0]),
        "rows": (first[1:], first[:-1]),
        "columns": (first[:, 1:], first[:, :-1]),
        "a row, and the next step of the row before": (first[1:], bits_of(2048, step=2)[0][:-1]),
    }
    for name, (one, other) in pairs.items():
        correlation = torch.corrcoef(torch.stack([one.double().flatten(), other.double().flatten()]))[0, 1]
        assert abs(correlation) < 5 / count**0.5, name


def test_the_bits_are_those_of_the_row_the_step_and_the_column():
    first, second = bits_of(50)
    ids, steps = torch.tensor([7, 3, 49]), torch.tensor([1.0, 2.0, 1.0])
    found = random_bits(ids, steps, torch.Size([2, 32]))
    assert torch.equal(found[0][0].flatten(), first[7]) and torch.equal(found[1][2].flatten(), second[49])
    assert torch.equal(found[0][1].flatten(), bits_of(50, step=2)[0][3])


def test_the_bits_are_those_of_splitmix64():
    """By its definition, in whole numbers of Python."""

    def mixed(number):
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            number = (number ^ (number >> shift)) * multiplier % 2**64
        return number ^ (number >> 31)

    for row, step, column in ((0, 1, 0), (5, 3, 2), (2**31 - 1, 2**20, 63)):
        wide = mixed((mixed((row << 32) + step) + (column + 1) * 0x9E3779B97F4A7C15) % 2**64)
        given = torch.tensor([row]), torch.tensor([float(step)]), torch.Size([64])
        assert [int(bits[0, column]) for bits in random_bits(*given)] == [(wide >> 32) % 2**16, wide >> 48]


def test_rounding_is_exact_in_the_mean():
    """Of numbers of both signs and many sizes; a number of bfloat16 stays as it is."""
    values = torch.randn(64) * 10.0 ** torch.linspace(-30, 30, 64)
    bits = bits_of(2**14)[0]
    found = rounded(values.expand(2**14, 64), bits)
    assert found.dtype == torch.bfloat16
    error = found.double().mean(0) - values.double()
    step = values.double().abs() * 2**-7  # the distance of two neighbours, or twice that
    assert (error.abs() < 5 * 0.5 * step / 2**7).all()
    assert (found.double() - values.double()).abs().max(0).values.gt(0).all()
    assert (found.double() - values.double()).abs().le(step).all()
    exact = values.bfloat16().float()
    assert torch.equal(rounded(exact.expand(2**14, 64), bits).float(), exact.expand(2**14, 64))


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_moments_are_exact_in_the_mean_over_rows(weight):
    """4,096 rows of one gradient, whose size falls: rounded to nearest, the second moment does not fall."""
    number, steps = 4096, 200
    means = {}
    for name, settings in {"random": BFLOAT16, "wide": FLOAT32, "nearest": {}}.items():
        if name == "nearest" and weight != torch.bfloat16:
            continue
        params = torch.nn.Parameter(torch.zeros(number, 2, dtype=weight))
        optimizer = RowSparseAdamW([params], lr=1e-3, betas=(0.9, 0.999), **settings)
        for step in range(steps):
            rows = torch.tensor([[1.0, -0.7]]).expand(number, 2) * (1.0 if step < 20 else 0.01)
            params.grad = torch.sparse_coo_tensor(torch.arange(number)[None], rows.to(weight), (number, 2))
            optimizer.step()
        state = optimizer.state[params]
        means[name] = torch.stack([state[one].double().mean(0) for one in ("exp_avg", "exp_avg_sq")])
    assert torch.allclose(means["random"], means["wide"], rtol=5e-3, atol=0)
    if weight == torch.bfloat16:
        assert (means["nearest"][1] > 1.1 * means["wide"][1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("settings", [BFLOAT16, FLOAT32], ids=str)
def test_a_run_with_moments_of_a_type_resumes_to_the_bit(apart, monkeypatch, dtype, offload, settings):
    """Also where rows are stepped in other chunks, and where moments lie elsewhere."""
    start, optimizer = trained(TOUCHED[:3], dtype=dtype, **settings)
    (wanted,) = settings.values()
    types = [optimizer.state[one]["exp_avg_sq"].dtype for one in start]
    assert types == [wanted, dtype, dtype]
    state = copy.deepcopy(optimizer.state_dict())
    whole, _ = trained(dtype=dtype, **settings)
    monkeypatch.setattr(row_optimizer, "CHUNK_ELEMENTS", 1)
    given = {"start": [torch.nn.Parameter(one.detach().clone()) for one in start], "state": state, "first": 3}
    found, resumed = trained(TOUCHED[3:], **given, offload_moments=offload, **settings)
    assert_equal(found, whole, 0)
    assert [resumed.state[one]["exp_avg_sq"].dtype for one in found] == types


def test_a_step_with_moments_in_bfloat16_is_nearly_that_with_moments_in_float32():
    found, expected = (trained(dtype=torch.float32, **settings)[0] for settings in (BFLOAT16, {}))
    moved = (expected[0] - parameters(torch.float32)[0]).abs().max()
    assert 0 < (found[0] - expected[0]).abs().max() < 0.02 * moved
    assert torch.equal(found[1], expected[1])


def test_a_state_of_another_type_is_taken_over():
    start, optimizer = trained(TOUCHED[:3], dtype=torch.float32)
    found, resumed = trained(TOUCHED[3:], start=start, state=optimizer.state_dict(), first=3, **BFLOAT16)
    assert resumed.state[found[0]]["exp_avg"].dtype == torch.bfloat16
    back = RowSparseAdamW(found, **SETTINGS)
    back.load_state_dict(resumed.state_dict())
    assert back.state[found[0]]["exp_avg"].dtype == torch.float32


def test_kernels_leave_rounding_to_torch_and_take_float32(monkeypatch):
    called = []
    monkeypatch.setattr("hf_dis.head.triton_adamw.adamw", lambda *args: called.append(args[0].dim()))
    counted(obstacle=None, **BFLOAT16)
    assert called == [1, 1]  # the bias's
    counted(obstacle=None, **FLOAT32)
    assert called == [1, 1, 2, 1, 2, 1]


def test_rounding_needs_no_wait_and_half_of_the_bytes():
    waits, _, _, after = counted(lambda counts, optimizer, params: optimizer.state[params[0]], **BFLOAT16)
    assert waits == 0 and after["exp_avg"].nbytes == after["exp_avg_sq"].nbytes == 2 * ROWS * WIDTH


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"moment_dtype is torch.float16: it has to be one of None, torch.float32"):
        RowSparseAdamW(parameters(), moment_dtype=torch.float16)
