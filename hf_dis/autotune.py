"""The choice between exact and sampled: both steps of an output head are timed on the device of the run."""

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

# Multiplications of the timed product over all classes: on CPU, and where the start of a kernel takes longer.
PRODUCT, ACCELERATOR_PRODUCT = 2**28, 2**33
# Elements of the teacher's logits that are ranked.
RANKED_ELEMENTS = 2**20

# Sampled classes have to be this many times faster: below, the gain is not worth the noise of the estimate. Near the
# crossover the noise of the clock should not decide either.
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
        """True if sampled classes are faster by more than ``MARGIN``."""
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
        context: entered around each timed part; ``accelerator.autocast`` for mixed precision.
    """
    steps = _HeadSteps(num_classes, num_features, spec.resolved(), torch.device(device))

    def cost(step: Callable[[], None]) -> float:
        return _fastest(step, steps, context)

    parts = num_classes / steps.part
    filling = 0 if row_sparse else cost(steps.fill) * parts
    # The sampled step ranks the slice of the classes; all classes are to be ranked in its place.
    ranking = cost(steps.rank) * ITEMS / len(steps.ranked_logits)
    sampling = max(0.0, cost(steps.sampled) - cost(steps.rank_part))
    return HeadCosts(cost(steps.exact) * parts, sampling + ranking + filling)


class _HeadSteps:
    """The timed parts, on random data.

    Args:
        num_classes: C.
        num_features: d, the width of the features.
        spec: how classes are sampled, with every size filled in.
        device: of the head.

    Attributes:
        part: the number of classes of the slice that the head is made of.
    """

    def __init__(self, num_classes: int, num_features: int, spec: SamplerSpec, device: torch.device):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        product = PRODUCT if device.type == "cpu" else ACCELERATOR_PRODUCT
        sampled_classes = spec.num_sampled_classes + spec.num_shared_classes * spec.num_tails
        self.device = device
        self.part = min(num_classes, max(4 * sampled_classes, product // (ITEMS * num_features)))
        self.features = random(ITEMS, num_features).requires_grad_()
        self.weight = random(self.part, num_features).requires_grad_()
        self.teacher_logits = random(ITEMS, self.part)
        self.ranked_logits = random(min(ITEMS, max(1, RANKED_ELEMENTS // num_classes)), num_classes)
        self.dis_loss = DISLoss(make_sampler(self.part, spec, device=device), TEMPERATURE, row_sparse_head=True)

    def exact(self) -> None:
        """Loss and gradients on all classes of the slice."""
        logits = self.features @ self.weight.T
        exact_loss(logits, self.part, [self.teacher_logits], None, TEMPERATURE, 0.0)[0].mean().backward()

    def sampled(self) -> None:
        """Ranking, sample, loss and gradients on sampled classes of the slice."""
        self.dis_loss(self.features, self.weight, None, self.teacher_logits).backward()

    def rank_part(self) -> None:
        """The ranking that the sampled step does."""
        self._rank(self.teacher_logits)

    def rank(self) -> None:
        """The ranking of all C classes, for some items."""
        self._rank(self.ranked_logits)

    def _rank(self, logits: torch.Tensor) -> None:
        TeacherTargets(logits, TEMPERATURE, self.dis_loss.sampler.rank_depth)

    def fill(self) -> None:
        """A dense gradient of zeros."""
        self.weight.grad = torch.empty_like(self.weight).zero_()


def _fastest(step: Callable[[], None], steps: _HeadSteps, context: Callable[[], AbstractContextManager]) -> float:
    """Milliseconds of the fastest of several runs of a step, after a first run that is not counted."""
    times = []
    for _ in range(1 + REPEATS):
        steps.features.grad = steps.weight.grad = None
        with torch.enable_grad(), context():
            times.append(_milliseconds(step, steps.device))
    return min(times[1:])


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1000 * (time.perf_counter() - started)
