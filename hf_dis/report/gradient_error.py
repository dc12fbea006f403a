"""The error of the sampled gradient, estimated from the sample itself: no other logit is computed."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.head.sampled_linear import sampled_logits, weighted_rows
from hf_dis.loss.divergence import Divergence, SampledLoss
from hf_dis.sampling.sample import ClassSample
from hf_dis.sampling.tails import of_items

# Items of a batch that are measured: the cost stays a small share of a step's, and the error is a mean over items.
MEASURED_ITEMS = 64


class GradientError(NamedTuple):
    """Squared errors of gradients on the head's input, and their squared length, estimated, ``[n]`` each.

    The root of the sum of errors over the sum of lengths is ‖ĝ - g‖ / ‖g‖.

    Attributes:
        own: squared error by the classes that an item samples of its own.
        shared: squared error by the classes of its tail.
        squared_length: of the exact gradient.
    """

    own: Tensor
    shared: Tensor
    squared_length: Tensor

    @property
    def squared_error(self) -> Tensor:
        """The squared error by all classes."""
        return self.own + self.shared


@torch.no_grad()
def gradient_error(weight: Tensor, sample: ClassSample, result: SampledLoss, divergence: Divergence) -> GradientError:
    """Estimates the error of the distillation gradient on the head's input, for some items of a batch.

    An estimate is a smooth function of weighted sums over the sampled classes. To first order its error is that of the
    sum of a residual r_j over the sampled classes j, weighted by ω_j = 1/π_j. The variance of this sum is estimated by
    Σ ω (ω - 1) |r|², as for a systematic sample of classes in random order, or by Σ ω² |r|² with replacement. The
    error of a truncation is not seen: its dropped classes are in no sample. Of a soft-capped head the slope of the cap
    is left out.

    Args:
        weight: of the student's head, ``[C, d]``.
        sample: the classes of N items.
        result: of the divergence at these classes.
        divergence: of the student from the teacher.

    Returns:
        estimates for at most ``MEASURED_ITEMS`` of the items; without the constant factors of loss and temperature.
    """
    with torch.autocast(weight.device.type, enabled=False):
        return _estimated(weight.detach(), *_some_items(sample, result), divergence)


def _estimated(weight: Tensor, sample: ClassSample, result: SampledLoss, divergence: Divergence) -> GradientError:
    used = ~sample.log_weights.isneginf() & sample.finite_items(result.signal)[:, None]
    weights, ids = sample.log_weights.exp().masked_fill(~used, 0), (sample.item_ids, sample.tail_ids)
    signal = result.signal.masked_fill(~used, 0)
    squares = signal.square() * _squared_lengths(weight, sample)
    centres = [
        (scales.masked_fill(~used, 0), weighted_rows(factors.masked_fill(~used, 0), weight, *ids))
        for scales, factors in divergence.centres(sample, result)
    ]
    for scales, centre in centres:
        products = sampled_logits(centre.to(weight.dtype), weight, None, *ids)
        squares -= 2 * signal * scales * products
        for other_scales, other in centres:
            squares += scales * other_scales * (centre * other).sum(1, keepdim=True)
    spread = weights.square() if sample.with_replacement else weights * (weights - 1)
    errors = spread.masked_fill(sample.certain, 0) * squares.clamp_min(0)
    own, shared = (part.sum(1) for part in errors.tensor_split([sample.item_ids.shape[1]], 1))
    factors = divergence.weighted_signal(sample, result).masked_fill(~used, 0)
    squared_length = weighted_rows(factors, weight, *ids).square().sum(1)
    # The square of an estimate is too long by its variance.
    return GradientError(own, shared, squared_length - own - shared)


def _some_items(sample: ClassSample, result: SampledLoss) -> tuple[ClassSample, SampledLoss]:
    """Selects items at equal distances, among which all tails are used in turn."""
    num_items, num_tails = len(sample), len(sample.tail_ids)
    stride = max(1, num_items // MEASURED_ITEMS)
    while gcd(stride, num_tails) > 1:
        stride -= 1
    items = torch.arange(0, num_items, stride, device=sample.item_ids.device)[:MEASURED_ITEMS]
    tails = torch.arange(num_tails, device=items.device) * stride % num_tails
    return sample.of_items(items, tails), SampledLoss(*(values.index_select(0, items) for values in result[:3]))


def _squared_lengths(weight: Tensor, sample: ClassSample) -> Tensor:
    """|w|² of every column, ``[n, R + K_t]``."""

    def lengths(ids: Tensor) -> Tensor:
        rows = weight.index_select(0, ids.flatten())
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)).square()

    own = lengths(sample.item_ids).view(sample.item_ids.shape)
    shared = lengths(sample.tail_ids).view(sample.tail_ids.shape)
    return torch.cat([own, of_items(shared, 0, len(sample))], 1)
