"""The floating-point types and the layouts of tensors that a device has."""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger(__name__)

# Types of devices that compute in float32 at most.
WITHOUT_FLOAT64 = frozenset({"mps"})
# Types of devices that need no trial of a sparse tensor.
WITH_SPARSE = frozenset({"cpu", "cuda", "meta"})


def widest(device: torch.device | str) -> torch.dtype:
    """The widest floating-point type of a device: float64, or float32 on a device without float64.

    Logs once per type of devices that there is no float64.
    """
    device = torch.device(device)
    lacks_it = device.type in WITHOUT_FLOAT64
    if device.type == "xpu":  # some have it, some do not
        lacks_it = not torch.xpu.get_device_properties(device).has_fp64
    if not lacks_it:
        return torch.float64
    _tell(f"{device.type} has no float64: samplers and running means compute in float32 there")
    return torch.float32


def product_type(features: torch.Tensor) -> torch.dtype:
    """The type in which a linear layer multiplies its input: that of autocast, or the input's own."""
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype


def widens_products(factor: torch.Tensor, product: torch.dtype) -> bool:
    """Returns True if a device can write a product of matrices in a wider type: NVIDIA's write float32.

    Args:
        factor: one of the matrices, of the type of both.
        product: the type of the product.
    """
    is_nvidia = factor.device.type == "cuda" and torch.version.hip is None
    return is_nvidia and factor.dtype in (torch.bfloat16, torch.float16) and product == torch.float32


def check_sparse(device: torch.device | str, wanted: str, remedy: str) -> None:
    """Checks that a device can hold sparse tensors.

    Args:
        device: of the tensors.
        wanted: the setting that needs sparse tensors, with its value.
        remedy: the setting that needs none.

    Raises:
        ValueError: if torch has no sparse tensors for the type of the device.
    """
    device = torch.device(device)
    if device.type in WITH_SPARSE:
        return
    try:
        place, row = torch.zeros(1, 1, dtype=torch.long, device=device), torch.zeros(1, 2, device=device)
        torch.sparse_coo_tensor(place, row, (1, 2), check_invariants=False, is_coalesced=True)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{wanted}, which needs sparse tensors, and torch has none for {device.type}: {remedy}"
        ) from error


@functools.cache
def _tell(message: str) -> None:
    logger.info(message)
