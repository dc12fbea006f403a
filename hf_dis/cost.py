"""What a training step of an output head costs, with all classes and with the drawn ones: timed where it is to run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from .drawn import drawn_logits
from .losses import exact_distillation_loss, sampled_distillation_loss
from .sampler import make_sampler
from .targets import TeacherTargets

ROWS, TEMPERATURE, REPEATS = 128, 2.0, 3

# Multiplications of the product that is timed for all classes, on CPU and where starting a kernel takes longer.
PRODUCT, ACCELERATOR_PRODUCT = 2**28, 2**33
# Elements of the teacher's logits that are ranked.
RANKED_ELEMENTS = 2**20

# How many times faster drawn classes have to be: an estimate has to be worth its noise, and near the crossover the
# clock's should not decide.
MARGIN = 1.2


class HeadCosts(NamedTuple):
    """Milliseconds of a head step of ``ROWS`` rows: loss and gradients, teacher logits given.

    Attributes:
        exact: with all classes.
        sampled: with drawn ones, ranking and drawing included.
    """

    exact: float
    sampled: float

    @property
    def sampling_pays(self) -> bool:
        return self.exact > MARGIN * self.sampled

    def __str__(self) -> str:
        return (
            f"a head step of {ROWS} rows takes about {self.exact:.3g} ms with all classes and {self.sampled:.3g} ms "
            f"with drawn ones, which have to be {MARGIN:g} times faster to be worth their noise"
        )


def measure_costs(
    num_classes: int,
    num_features: int,
    *,
    row_sparse: bool = False,
    device: torch.device | str = "cpu",
    context: Callable[[], AbstractContextManager] = nullcontext,
    **layout,
) -> HeadCosts:
    """Times the parts of both steps on random data, and scales those that grow with C from a slice of the classes.

    Takes about half a second on a CPU, however large C is.

    Args:
        num_classes: C.
        num_features: d, what the head is given.
        row_sparse: whether the head's gradient is to be row-sparse; a dense one is filled with C·d zeros.
        device: where the head is.
        context: entered around what is timed; ``accelerator.autocast`` for mixed precision.
        **layout: for :func:`hf_dis.make_sampler`.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    product = PRODUCT if device.type == "cpu" else ACCELERATOR_PRODUCT
    drawn = layout["num_sampled_classes"] + layout["num_shared_classes"] * layout.get("num_tails", 1)
    part = min(num_classes, max(4 * drawn, product // (ROWS * num_features)))
    sampler = make_sampler(part, **layout)
    features, weight = random(ROWS, num_features).requires_grad_(), random(part, num_features).requires_grad_()
    teacher_logits = random(ROWS, part)
    targets = TeacherTargets(teacher_logits, TEMPERATURE, sampler.rank_depth)
    ranked_rows = min(ROWS, max(1, RANKED_ELEMENTS // num_classes))
    ranked_logits = random(ranked_rows, num_classes)

    def exact() -> None:
        exact_distillation_loss(features @ weight.T, teacher_logits, TEMPERATURE).mean().backward()

    def rank() -> None:
        TeacherTargets(ranked_logits, TEMPERATURE, sampler.rank_depth)

    def sampled() -> None:
        with torch.no_grad():
            draw = sampler.draw([targets])
        logits = drawn_logits(features, weight, None, draw.row_ids, draw.shared_ids, True, draw.updates)
        loss, disagreement = sampled_distillation_loss(logits, draw, TEMPERATURE)
        sampler.learn(draw, disagreement)
        loss.mean().backward()

    def fill() -> None:
        weight.grad = torch.empty_like(weight).zero_()

    def cost(step: Callable[[], None]) -> float:
        times = []
        for _ in range(1 + REPEATS):
            features.grad = weight.grad = None
            with torch.enable_grad(), context():
                times.append(_milliseconds(step, device))
        return min(times[1:])

    parts = num_classes / part
    filling = 0 if row_sparse else cost(fill) * parts
    return HeadCosts(cost(exact) * parts, cost(sampled) + cost(rank) * ROWS / ranked_rows + filling)


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1000 * (time.perf_counter() - started)
