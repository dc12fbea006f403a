"""Quality of the estimate: effective sample size, coverage, and the probe, a comparison with exact distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.loss.divergence import FORWARD_KL, Divergence, SampledLoss
from hf_dis.loss.exact import exact_loss
from hf_dis.precision import widest
from hf_dis.report.gradient_error import GradientError
from hf_dis.sampling.sample import ClassSample

# Larger errors of a gradient are logged as this value.
LARGEST_ERROR = 10.0


@torch.no_grad()
def effective_sample_size(sample: ClassSample, log_student: Tensor) -> Tensor:
    """The effective sample size of each item in equally weighted classes, ``[N]``, between 1 and its columns.

    Certain classes count in full. The other classes count as ``(Σ a)² / Σ a²``, where ``a = ω s`` is the share of a
    class in the student's normaliser. This is 1 if one class has the whole share, and the number of classes if all
    shares are equal.

    Args:
        sample: the classes.
        log_student: log s at every column, as :class:`hf_dis.loss.divergence.SampledLoss` has it, ``[N, R + K_t]``.
    """
    used = sample.log_weights > -torch.inf
    share = (log_student + sample.log_weights).exp().masked_fill(sample.certain | ~used, 0)
    random = share.sum(1).square() / share.square().sum(1).clamp_min(torch.finfo(share.dtype).tiny)
    return (sample.certain & used).sum(1) + random


@torch.no_grad()
def coverage(sample: ClassSample) -> Tensor:
    """The teacher's probability of the sampled classes, each counted once, ``[N]``, within [0, 1]."""
    used = sample.log_weights > -torch.inf
    if sample.with_replacement:
        ranks, order = sample.ranks.sort(dim=1)
        repeated = F.pad(ranks[:, 1:] == ranks[:, :-1], (1, 0))
        used[:, : ranks.shape[1]] &= torch.zeros_like(repeated).scatter_(1, order, ~repeated)
    return sample.log_probs.exp().masked_fill(~used, 0).sum(1)


@torch.no_grad()
def certain_share(sample: ClassSample) -> Tensor:
    """The share of certain classes among each item's K ranked columns, ``[N]``, within [0, 1]."""
    return sample.certain[:, : sample.ranks.shape[1]].float().mean(1)


def sample_quality(sample: ClassSample, result: SampledLoss) -> dict[str, Tensor]:
    """The logged numbers of a sample: ``ess``, ``coverage`` and ``certain``, per item, ``[N]``."""
    return {
        "ess": effective_sample_size(sample, result.log_student),
        "coverage": coverage(sample),
        "certain": certain_share(sample),
    }


def probe(
    weight: Tensor,
    bias: Tensor | None,
    features: Tensor,
    sample: ClassSample,
    teacher_logits: Iterable[Tensor],
    temperature: float,
    after_head: Callable[[Tensor], Tensor],
    divergence: Divergence = FORWARD_KL,
) -> dict[str, Tensor]:
    """Compares the sampled distillation loss of a batch and its gradient on the features with exact distillation.

    Args:
        weight, bias: of the student's output head, ``[C, d]`` and ``[C]`` or None.
        features: input of the head, ``[N, d]``.
        sample: the classes sampled for these items.
        teacher_logits: ``[n, C]`` for consecutive chunks of the items; the exact loss is computed chunk by chunk.
        temperature: τ.
        after_head: maps the head's logits to the student's, element by element.
        divergence: the distillation loss.

    Returns:
        scalars: ``exact_kd_loss`` and ``sampled_kd_loss``, means over items; ``cosine`` and ``relative_error``,
        ‖ĝ - g‖ / ‖g‖, of the gradients.
    """
    with torch.enable_grad():
        features = features.detach().to(weight.dtype).requires_grad_()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        logits = after_head(sampled_logits(features, weight, bias, sample.item_ids, sample.tail_ids))
        sampled = divergence.sampled(logits, sample, temperature).loss.mean()
        (sampled_gradient,) = torch.autograd.grad(sampled, features)
        exact, exact_gradient, first = 0.0, torch.zeros_like(features), 0
        for chunk in teacher_logits:
            items = slice(first, first + len(chunk))
            part = features[items].detach().requires_grad_()
            logits = after_head(F.linear(part, weight, bias))
            loss, _ = exact_loss(logits, chunk.shape[1], [chunk], None, temperature, 0.0, divergence)
            loss = loss.sum() / len(features)
            (exact_gradient[items],) = torch.autograd.grad(loss, part)
            exact = exact + loss.detach()
            first = items.stop
    error = (sampled_gradient - exact_gradient).norm() / exact_gradient.norm()
    return {
        "exact_kd_loss": exact,
        "sampled_kd_loss": sampled.detach(),
        "cosine": F.cosine_similarity(sampled_gradient.flatten(), exact_gradient.flatten(), dim=0),
        "relative_error": error,
    }


class RunningMeans:
    """Means of named values over items and steps, kept on the device until :meth:`pop`.

    An error of gradients becomes ‖ĝ - g‖ / ‖g‖, the root of the sum of squared errors over the sum of squared lengths,
    at most ``LARGEST_ERROR``.
    """

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._errors: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """True if a value of that name was added since the last call of :meth:`pop`."""
        return name in self._sums

    def add(self, values: dict[str, Tensor | GradientError], counts: Tensor | None = None) -> None:
        """Adds values of any shape, or errors of gradients.

        Args:
            values: by name; an element counts as one item.
            counts: where the elements are sums over items, the number of items of each.
        """
        for name, value in values.items():
            over = counts
            if isinstance(value, GradientError):
                self._errors.add(name)
                value, over = value.squared_error, value.squared_length
            dtype = widest(value.device)
            value = value.detach().to(dtype)
            count = value.new_full((), value.numel()) if over is None else over.to(dtype).sum()
            step = torch.stack([value.sum(), count])
            self._sums[name] = self._sums[name] + step if name in self._sums else step

    def pop(self, reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> dict[str, float]:
        """The means since the last call, which are then cleared.

        Args:
            reduce: sums a dict of tensors over processes; not needed with one process.
        """
        sums, self._sums = self._sums, {}
        if reduce is not None and sums:
            sums = reduce(sums)
        means = {name: float(total / count) for name, (total, count) in sums.items()}
        # The length of a gradient that is lost in its noise is not known to be above 0.
        lost = LARGEST_ERROR**2
        squares = {name: means[name] if 0 <= means[name] < lost else lost for name in self._errors & set(means)}
        roots = {name: math.sqrt(square) for name, square in squares.items()}
        return means | roots
