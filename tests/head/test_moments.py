"""Moments of a row-sparse weight in host memory: the same steps, and only the rows of a step travel."""

import io
import logging
from unittest import mock

import pytest
import torch
from fake_cuda import fake_cuda
from test_optimizer import SETTINGS, assert_equal, parameters, take_step

from hf_dis import RowSparseAdamW, kernels
from hf_dis.head import optimizer as row_optimizer

TOUCHED = [[0, 3], [1, 2], [3], [], [0, 1, 5], [2, 6]]
ROWS, WIDTH, IN_A_STEP = 100_000, 256, 1000


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
    assert (logging.INFO, "optimizer: torch steps the rows whose moments lie in host memory") in told
    kernels.tell_once.cache_clear()
