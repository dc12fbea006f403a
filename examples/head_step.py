"""Times one training step of an output head, exact against DIS, with the teacher's logits given."""

from __future__ import annotations

import statistics
import time

import torch

from hf_dis import SamplerSpec, DISLoss, make_sampler
from hf_dis.loss.divergence import exact_distillation_loss


def time_head_steps(
    num_classes: int, num_items: int = 128, num_features: int = 256, repeats: int = 5, **sampler_arguments
) -> dict[str, float]:
    """Median milliseconds of exact and DIS steps on the same tensors, measured in turn.

    Args:
        num_classes: C.
        num_items: N.
        num_features: d.
        repeats: steps of each, after one that is not counted.
        **sampler_arguments: for :func:`hf_dis.make_sampler`.

    Returns:
        ``exact`` and ``dis``: loss forward and backward, down to the head's dense gradient; ``adamw``: what fused
        AdamW adds to either, since it passes over the whole head.
    """
    torch.manual_seed(0)
    head = torch.nn.Linear(num_features, num_classes)
    features = torch.randn(num_items, num_features, requires_grad=True)
    teacher_logits = 3 * torch.randn(num_items, num_classes)
    dis_loss = DISLoss(make_sampler(num_classes, SamplerSpec(**sampler_arguments)), hard_label_weight=0.0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, fused=True)

    def exact():
        exact_distillation_loss(head(features), teacher_logits, 2.0).mean().backward()

    def dis():
        dis_loss(features, head.weight, head.bias, teacher_logits).backward()

    times: dict[str, list[float]] = {"exact": [], "dis": [], "adamw": []}
    for _ in range(repeats + 1):
        for name, step in (("exact", exact), ("dis", dis), ("adamw", optimizer.step)):
            if name != "adamw":
                optimizer.zero_grad()
            started = time.perf_counter()
            step()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values[1:]) for name, values in times.items()}
