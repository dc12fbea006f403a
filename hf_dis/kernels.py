"""The choice between Triton's kernels and plain torch, and two helpers that all kernels share."""

from __future__ import annotations

import functools
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# The environment variable that chooses, and its values; auto is the default.
VARIABLE = "HF_DIS_KERNELS"
VALUES = ("auto", "torch", "triton")

# Ampere, the oldest NVIDIA architecture that computes in bfloat16.
LOWEST_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
def uses_triton(device: torch.device) -> bool:
    """Returns True if Triton's kernels compute a device's tensors, as ``HF_DIS_KERNELS`` sets; logs the choice once.

    ``auto`` takes the kernels where :func:`obstacle` finds none, ``torch`` never, ``triton`` always. With
    ``TRITON_INTERPRET=1``, ``triton`` takes the kernels for CPU tensors too: an interpreter, for tests.

    Args:
        device: of the tensors.

    Raises:
        ValueError: if ``HF_DIS_KERNELS`` has an unknown value.
        RuntimeError: if ``triton`` is set and the kernels are unavailable.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in VALUES:
        raise ValueError(f"{VARIABLE} is {wanted!r}, and has to be one of {', '.join(VALUES)}; set one or unset it")
    if wanted == "torch":
        tell_once(logging.INFO, f"kernels: torch ({VARIABLE} is torch)")
        return False
    if wanted == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return True
    missing = obstacle(device)
    if missing is None:
        tell_once(logging.INFO, "kernels: triton")
        return True
    if wanted == "triton":
        raise RuntimeError(
            f"{VARIABLE} is triton, and {missing}: the kernels need triton and an NVIDIA device of compute capability "
            f"{'.'.join(map(str, LOWEST_CAPABILITY))} or higher; set {VARIABLE} to auto, or to torch"
        )
    # On CUDA the plain path costs speed, so the reader gets a warning with the cause.
    tell_once(logging.WARNING if device.type == "cuda" else logging.INFO, f"kernels: torch ({missing})")
    return False


@functools.cache
def tell_once(level: int, message: str) -> None:
    """Logs a message, once per process.

    Args:
        level: of the logging module.
        message: to log.
    """
    logger.log(level, message)


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Names the reason why a device cannot run Triton's kernels; None where it can.

    Args:
        device: of the tensors.
    """
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "the device is of ROCm"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not importable"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    return (
        None
        if capability >= LOWEST_CAPABILITY
        else f"the device has compute capability {capability[0]}.{capability[1]}"
    )


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """The type in which a kernel sums: float32, or float64 where one of the tensors is float64."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def unit_columns(tensor: Tensor) -> Tensor:
    """Returns a matrix whose columns lie side by side in memory, as kernels read them: a copy if they do not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block_size(size: int, largest: int) -> int:
    """Returns the power of two that holds a size, or the largest block of a kernel, itself a power of two."""
    return min(largest, 1 << max(0, size - 1).bit_length())
