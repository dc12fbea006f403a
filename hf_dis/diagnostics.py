"""Numbers that show whether the estimate can be trusted: effective sample size, coverage, and the exact probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawn import drawn_logits
from .losses import exact_distillation_loss, sampled_distillation_loss
from .sampling import ClassDraw


@torch.no_grad()
def effective_sample_size(draw: ClassDraw, disagreement: Tensor) -> Tensor:
    """How many equally weighted classes the draw of each row is worth, ``[N]``, between 1 and its columns.

    Certain classes count in full. The others count as ``(Σ a)² / Σ a²`` with ``a = ω s``, the share of the student's
    normaliser that each stands for: 1 if a single draw carries it all, their number if all carry the same.
    """
    used = draw.log_weights > -torch.inf
    student = (disagreement + draw.log_probs.exp()).clamp_min(0)
    share = (student * draw.log_weights.exp()).masked_fill(draw.certain | ~used, 0)
    random = share.sum(1).square() / share.square().sum(1).clamp_min(torch.finfo(share.dtype).tiny)
    return (draw.certain & used).sum(1) + random


@torch.no_grad()
def coverage(draw: ClassDraw) -> Tensor:
    """The teacher's probability of the drawn classes, each counted once, ``[N]``, within [0, 1]."""
    used = draw.log_weights > -torch.inf
    if draw.with_replacement:
        ranks, order = draw.ranks.sort(dim=1)
        repeated = F.pad(ranks[:, 1:] == ranks[:, :-1], (1, 0))
        used[:, : ranks.shape[1]] &= torch.zeros_like(repeated).scatter_(1, order, ~repeated)
    return draw.log_probs.exp().masked_fill(~used, 0).sum(1)


@torch.no_grad()
def certain_share(draw: ClassDraw) -> Tensor:
    """The share of each row's K ranked draws that were certain to be drawn, ``[N]``."""
    return draw.certain[:, : draw.ranks.shape[1]].float().mean(1)


def draw_quality(draw: ClassDraw, disagreement: Tensor) -> dict[str, Tensor]:
    """What is logged of a draw: ``ess``, ``coverage`` and ``certain``, of each row, ``[N]``."""
    return {
        "ess": effective_sample_size(draw, disagreement),
        "coverage": coverage(draw),
        "certain": certain_share(draw),
    }


def probe(
    weight: Tensor,
    bias: Tensor | None,
    features: Tensor,
    draw: ClassDraw,
    teacher_logits: Iterable[Tensor],
    temperature: float,
    after_head: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Compares the sampled distillation loss of a batch, and its gradient on the features, with the exact ones.

    Args:
        weight, bias: of the student's output head, ``[C, d]`` and ``[C]`` or None.
        features: what it is given, ``[N, d]``.
        draw: the classes drawn for these rows.
        teacher_logits: ``[n, C]`` for consecutive chunks of the rows; the exact loss is computed chunk by chunk.
        temperature: τ.
        after_head: what the student does to the head's logits, element by element.

    Returns:
        scalars ``exact_kd_loss``, ``sampled_kd_loss`` (means over rows), ``cosine`` and ``relative_error``
        (‖ĝ - g‖ / ‖g‖) between the gradients.
    """
    with torch.enable_grad():
        features = features.detach().to(weight.dtype).requires_grad_()
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        logits = after_head(drawn_logits(features, weight, bias, draw.row_ids, draw.shared_ids))
        sampled = sampled_distillation_loss(logits, draw, temperature)[0].mean()
        (sampled_gradient,) = torch.autograd.grad(sampled, features)
        exact, exact_gradient, first_row = 0.0, torch.zeros_like(features), 0
        for chunk in teacher_logits:
            rows = slice(first_row, first_row + len(chunk))
            part = features[rows].detach().requires_grad_()
            logits = after_head(F.linear(part, weight, bias))[:, : chunk.shape[1]]
            loss = exact_distillation_loss(logits, chunk, temperature).sum() / len(features)
            (exact_gradient[rows],) = torch.autograd.grad(loss, part)
            exact = exact + loss.detach()
            first_row = rows.stop
    error = (sampled_gradient - exact_gradient).norm() / exact_gradient.norm()
    return {
        "exact_kd_loss": exact,
        "sampled_kd_loss": sampled.detach(),
        "cosine": F.cosine_similarity(sampled_gradient.flatten(), exact_gradient.flatten(), dim=0),
        "relative_error": error,
    }


class RunningMeans:
    """Means of named values over rows and steps, kept on the device until they are asked for."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        """Whether there was a value since the last call of :meth:`pop`."""
        return name in self._sums

    def add(self, values: dict[str, Tensor], counts: Tensor | None = None) -> None:
        """Takes in values of any shape: each element counts as one, or, being a sum, as ``counts`` says."""
        for name, value in values.items():
            value = value.detach().double()
            count = value.new_full((), value.numel()) if counts is None else counts.double().sum()
            step = torch.stack([value.sum(), count])
            self._sums[name] = self._sums[name] + step if name in self._sums else step

    def pop(self, reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> dict[str, float]:
        """The means since the last call, summed over processes by ``reduce``; starts anew."""
        sums, self._sums = self._sums, {}
        if reduce is not None and sums:
            sums = reduce(sums)
        return {name: float(total / count) for name, (total, count) in sums.items()}
