"""Exact or sampled: both steps of an output head are timed where they will run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from hf_dis.arguments import SamplerSpec
from hf_dis.dis_loss import DISLoss
from hf_dis.loss.exact import exact_loss
from hf_dis.sampling.sampler import make_sampler
from hf_dis.teacher.targets import TeacherTargets

ITEMS, TEMPERATURE, REPEATS = 128, 2.0, 3

# Multiplications of the product that is timed for all classes: on CPU, and where starting a kernel takes longer.
PRODUCT, ACCELERATOR_PRODUCT = 2**28, 2**33
# Elements of the teacher's logits that are ranked.
RANKED_ELEMENTS = 2**20

# Sampled classes have to be this many times faster: below, the noise of the estimate is not worth it, and near the
# crossover the noise of the clock should not decide.
MARGIN = 1.2


class HeadCosts(NamedTuple):
    """Milliseconds of a head step of ``ITEMS`` items: loss and gradients, teacher logits given.

    Attributes:
        exact: with all classes.
        sampled: with sampled classes, ranking and sampling included.
    """

    exact: float
    sampled: float

    @property
    def sampling_pays(self) -> bool:
        return self.exact > MARGIN * self.sampled

    def __str__(self) -> str:
        return (
            f"a head step of {ITEMS} items takes about {self.exact:.3g} ms with all classes and {self.sampled:.3g} ms "
            f"with sampled classes, which have to be {MARGIN:g} times faster"
        )


def measure_costs(
    num_classes: int,
    num_features: int,
    spec: SamplerSpec,
    *,
    row_sparse: bool = False,
    device: torch.device | str = "cpu",
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> HeadCosts:
    """Times the parts of both steps on random data, and scales those that grow with C from a slice of the classes.

    Takes about half a second on a CPU, however large C is.

    Args:
        num_classes: C.
        num_features: d, the width of the features.
        spec: how classes are sampled.
        row_sparse: the head's gradient is to be row-sparse; a dense one is filled with C·d zeros.
        device: of the head.
        context: entered around what is timed; ``accelerator.autocast`` for mixed precision.
    """
    device, spec = torch.device(device), spec.resolved()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    product = PRODUCT if device.type == "cpu" else ACCELERATOR_PRODUCT
    sampled_classes = spec.num_sampled_classes + spec.num_shared_classes * spec.num_tails
    part = min(num_classes, max(4 * sampled_classes, product // (ITEMS * num_features)))
    sampler = make_sampler(part, spec, device=device)
    features, weight = random(ITEMS, num_features).requires_grad_(), random(part, num_features).requires_grad_()
    teacher_logits = random(ITEMS, part)
    ranked_items = min(ITEMS, max(1, RANKED_ELEMENTS // num_classes))
    ranked_logits = random(ranked_items, num_classes)
    dis_loss = DISLoss(sampler, TEMPERATURE, row_sparse_head=True)

    def exact() -> None:
        exact_loss(features @ weight.T, part, [teacher_logits], None, TEMPERATURE, 0.0)[0].mean().backward()

    def rank(logits: torch.Tensor = ranked_logits) -> None:
        TeacherTargets(logits, TEMPERATURE, sampler.rank_depth)

    def sampled() -> None:
        dis_loss(features, weight, None, teacher_logits).backward()

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
    ranking = cost(rank) * ITEMS / ranked_items
    # The sampled step ranks the slice; its ranking is replaced by that of all classes.
    sampling = max(0.0, cost(sampled) - cost(lambda: rank(teacher_logits)))
    return HeadCosts(cost(exact) * parts, sampling + ranking + filling)


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1000 * (time.perf_counter() - started)
