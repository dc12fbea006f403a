"""The log-softmax on sampled classes, and the backward of losses that compute their gradient in forward."""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_log_softmax(logits: Tensor, log_weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Estimates log s at sampled classes, with the normaliser from these classes.

    Args:
        logits: of the sampled classes, ``[n, K]``.
        log_weights: log ω, ``[n, K]``.
        temperature: τ > 0.

    Returns:
        log s, above minus infinity, and log ω s, ``[n, K]`` each.
    """
    log_shares, minus_normaliser = weighted_log_softmax(logits, log_weights, temperature)
    return above_minus_inf(torch.add(minus_normaliser, logits, alpha=1 / temperature)), log_shares


def weighted_log_softmax(logits: Tensor, log_weights: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Computes the logarithm of the shares in ``Σ ω exp(z / τ)``, and minus the logarithm of this sum.

    Args:
        logits: of the sampled classes, ``[n, K]``.
        log_weights: log ω, float32 or wider, ``[n, K]``.
        temperature: τ > 0.

    Returns:
        ``[n, K]`` and ``[n, 1]``.
    """
    weighted = torch.add(log_weights, logits, alpha=1 / temperature)  # widens in one launch
    log_shares = weighted.log_softmax(1)
    # logsumexp takes eight launches; the highest column of each gives the same number.
    return log_shares, log_shares.amax(1, keepdim=True).sub_(weighted.amax(1, keepdim=True))


def above_minus_inf(values: Tensor) -> Tensor:
    """Replaces the -inf of masked classes by the lowest number, so that 0 · log 0 is 0 and not NaN."""
    return values.clamp_min(torch.finfo(values.dtype).min)


def times_each(factors: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies the gradient of each item by a factor, and rounds once: ``[N, R]`` in a type, in one launch."""
    if gradient.dtype == dtype:
        return factors[:, None] * gradient
    return torch.mul(factors[:, None], gradient, out=torch.empty_like(gradient, dtype=dtype))
