"""The choice of the kernels, and the tests of the kernels in Triton's interpreter."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import fake_cuda
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dis import kernels
from hf_dis.kernels import obstacle, uses_triton

pytest.importorskip("triton")
HERE = Path(__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    """No choice by the environment, and nothing told or found yet."""
    for name in (kernels.VARIABLE, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    kernels.tell_once.cache_clear()
    obstacle.cache_clear()
    yield
    obstacle.cache_clear()


@pytest.fixture
def told(monkeypatch):
    """The messages of the choice, by level."""
    messages = SimpleNamespace(info=[], warning=[])
    by_level = {logging.INFO: messages.info, logging.WARNING: messages.warning}
    monkeypatch.setattr(kernels.logger, "log", lambda level, message: by_level[level].append(message))
    return messages


@pytest.fixture
def device(monkeypatch):
    """An NVIDIA device of a capability."""

    def make(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return make


@pytest.mark.parametrize("wanted", [None, "auto", "triton"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
def test_an_nvidia_device_takes_the_kernels(wanted, capability, device, told, monkeypatch):
    device(capability)
    if wanted:
        monkeypatch.setenv(kernels.VARIABLE, wanted)
    assert uses_triton(CUDA) and uses_triton(CUDA)
    assert told.info == ["kernels: triton"] and told.warning == []


def test_torch_can_be_asked_for(device, told, monkeypatch):
    device((9, 0))
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert not uses_triton(CUDA)
    assert told.info == ["kernels: torch (HF_DIS_KERNELS is torch)"]


def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


def of_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")


def nothing(monkeypatch):
    pass


REASONS = [
    (CUDA, (9, 0), without_triton, "triton is not importable"),
    (CUDA, (9, 0), of_rocm, "the device is of ROCm"),
    (CUDA, (7, 5), nothing, "the device has compute capability 7.5"),
    (CUDA, None, nothing, "torch finds no CUDA device"),
    (CPU, (9, 0), nothing, "the device is cpu"),
    (torch.device("mps"), None, nothing, "the device is mps"),
    (torch.device("xpu"), None, nothing, "the device is xpu"),
]
NAMES = [reason for *_, reason in REASONS]


@pytest.mark.parametrize(("where", "capability", "change", "reason"), REASONS, ids=NAMES)
def test_other_devices_take_torch(where, capability, change, reason, device, told, monkeypatch):
    if capability:
        device(capability)
    change(monkeypatch)
    assert not uses_triton(where) and not uses_triton(where)
    assert told.info + told.warning == [f"kernels: torch ({reason})"]
    assert bool(told.warning) == (where.type == "cuda")


@pytest.mark.parametrize(("where", "capability", "change", "reason"), REASONS, ids=NAMES)
def test_kernels_that_cannot_be_had_are_refused(where, capability, change, reason, device, monkeypatch):
    if capability:
        device(capability)
    change(monkeypatch)
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=f"HF_DIS_KERNELS is triton, and {reason}: .* or higher; set .* to auto"):
        uses_triton(where)


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"HF_DIS_KERNELS is 'cuda'.* one of auto, torch, triton"):
        uses_triton(CPU)


@pytest.mark.parametrize(("wanted", "interprets", "expected"), [("triton", "1", True), ("auto", "1", False)])
def test_the_interpreter_takes_cpu_tensors_where_asked(wanted, interprets, expected, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, wanted)
    monkeypatch.setenv("TRITON_INTERPRET", interprets)
    assert uses_triton(CPU) == expected


def test_the_choice_does_not_break_a_compiled_graph():
    def double(values):
        return values * (3 if uses_triton(values.device) else 2)

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [2, 2]


# Counted on a device that is not there


class Launches(TorchDispatchMode):
    """Collects the names of the package's operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "hf_dis":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_a_kernel_is_one_launch_on_fake_tensors():
    from hf_dis.head import triton_products, triton_rows
    from hf_dis.loss import triton_sampled
    from hf_dis.teacher import triton_normaliser

    with fake_cuda(), Launches() as launches:
        features, weight = torch.empty(6, 5, device="cuda", dtype=torch.bfloat16), torch.empty(9, 5, device="cuda")
        ids, scales = torch.empty(6, 3, device="cuda", dtype=torch.long), torch.empty(6, 3, device="cuda")
        results = [
            triton_products.item_products(features, weight, ids, scales[None, :, :2], torch.float32),
            triton_products.features_gradient(scales, weight, ids, None, torch.float32),
            triton_rows.segment_rows(features, ids.flatten(), scales.flatten(), ids[:, 0], torch.bfloat16),
            *triton_normaliser.log_normaliser(features, 2.0, 2, 2),
            triton_normaliser.class_mass(features, scales[:, :1], 2.0, 4),
            *triton_sampled.forward_kl(scales, scales, scales, scales, 2.0),
            *triton_sampled.cross_entropy(features, features, 1),
        ]
    assert {tensor.device.type for tensor in results} == {"cuda"}
    shapes = [(6, 5), (6, 5), (5, 5), (6, 1), (6, 2), (5,), (6,), (6, 3), (6, 3), (6, 3), (6,), (6, 5)]
    assert [tuple(tensor.shape) for tensor in results] == shapes
    assert [tensor.dtype for tensor in results] == [
        *[torch.float32] * 2,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        *[torch.float32] * 7,
    ]
    assert launches.names == [
        "item_products",
        "features_gradient",
        "segment_pieces",
        "join_pieces",
        "log_normaliser",
        "class_mass",
        "sampled_forward_kl",
        "sampled_cross_entropy",
    ]


@pytest.mark.parametrize("shape", [(9, 5), (9,)], ids=["weight", "bias"])
def test_the_step_of_a_parameters_rows_is_two_launches(shape, monkeypatch):
    from hf_dis import RowSparseAdamW

    monkeypatch.setattr(kernels, "obstacle", lambda device: None)
    with fake_cuda():
        parameter = torch.nn.Parameter(torch.empty(shape, device="cuda"))
        rows, ids = torch.empty(2, *shape[1:], device="cuda"), torch.empty(1, 2, device="cuda", dtype=torch.long)
        parameter.grad = torch.sparse_coo_tensor(ids, rows, shape, is_coalesced=True, check_invariants=False)
        with Launches() as launches:
            RowSparseAdamW([parameter]).step()
    assert launches.names == ["row_factors", "step_rows"]


# In Triton's interpreter


# The interpreter is slow. The product and the loss, which every step has, are tested each time.
SHORT = ("interpreted_products", "interpreted_losses")
INTERPRETED = [
    pytest.param(file, marks=[] if file.stem in SHORT else [pytest.mark.slow], id=file.stem)
    for file in sorted(HERE.glob("interpreted_*.py"))
]


@pytest.mark.parametrize("file", INTERPRETED)
def test_the_kernels_in_the_interpreter(file):
    """In a process of their own: the variable has to be set before triton is imported."""
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(file),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", kernels.VARIABLE: "triton", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
