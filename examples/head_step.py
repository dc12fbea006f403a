"""Times one training step of an output head, exact against DIS, with the teacher's logits given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_dis import DISLoss, SamplerSpec, make_sampler
from hf_dis.loss.exact_head import exact_head_loss

TEMPERATURE = 2.0


def materialised_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """τ² KL(p ‖ s) by autograd, every intermediate result a whole ``[N, C]``: ``[N]``.

    The library's exact loss before its gradient was computed in forward, kept for comparison.

    Args:
        logits, teacher_logits: float32 or wider, ``[N, C]``.
        temperature: τ > 0.
    """
    lowest = torch.finfo(logits.dtype).min
    student = (logits / temperature).log_softmax(1).clamp_min(lowest)
    teacher = (teacher_logits / temperature).log_softmax(1).clamp_min(lowest)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def milliseconds_by_clock(call: Callable[[], object]) -> float:
    """Returns the milliseconds of a call on a processor."""
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def time_head_steps(
    num_classes: int,
    spec: SamplerSpec | None = None,
    num_items: int = 128,
    num_features: int = 256,
    repeats: int = 5,
    *,
    device: torch.device | str = "cpu",
    milliseconds: Callable[[Callable[[], object]], float] = milliseconds_by_clock,
) -> dict[str, float]:
    """Median milliseconds of exact and DIS steps on the same tensors, measured in turn.

    Args:
        num_classes: C.
        spec: how DIS samples classes; the default if None.
        num_items: N.
        num_features: d.
        repeats: steps of each, after one that is not counted.
        device: of all tensors.
        milliseconds: measures a call on the device.

    Returns:
        loss forward and backward, down to the head's dense gradient: ``exact``, all classes by the library's loss;
        ``exact (materialised)``, all classes by autograd; ``dis``, sampled classes. And ``adamw``: the time that fused
        AdamW adds to any of them, because it passes over the whole head.
    """
    torch.manual_seed(0)
    head = torch.nn.Linear(num_features, num_classes, device=device)
    features = torch.randn(num_items, num_features, requires_grad=True, device=device)
    teacher_logits = 3 * torch.randn(num_items, num_classes, device=device)
    dis_loss = DISLoss(make_sampler(num_classes, spec, device=device), TEMPERATURE, hard_label_weight=0.0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, fused=True)

    def exact() -> None:
        linear = features, head.weight, head.bias
        loss, _ = exact_head_loss(*linear, lambda: [teacher_logits], None, TEMPERATURE, 0.0)
        loss.mean().backward()

    def materialised() -> None:
        materialised_loss(head(features), teacher_logits, TEMPERATURE).mean().backward()

    def dis() -> None:
        dis_loss(features, head.weight, head.bias, teacher_logits).backward()

    steps = {"exact": exact, "exact (materialised)": materialised, "dis": dis, "adamw": optimizer.step}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            if name != "adamw":
                optimizer.zero_grad()
            times[name].append(milliseconds(step))
    return {name: statistics.median(values[1:]) for name, values in times.items()}
