"""The choice between exact and sampled: both steps of an output head are timed on the device of the run.

The steps are those of training: losses, samplers and heads are the same functions, with the run's number of items and
its chunks of teacher's logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.head.sampled_linear import sampled_logits
from hf_dis.loss.exact import slices
from hf_dis.loss.exact_head import exact_head_loss
from hf_dis.loss.sampled import sampled_loss
from hf_dis.sampler_spec import SamplerSpec
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.sampling.sampler import make_sampler
from hf_dis.teacher.cached import CachedTargets
from hf_dis.teacher.compact import CompactTargets, TargetLayout, compact_targets
from hf_dis.teacher.targets import TeacherTargets, chunk_items

TEMPERATURE, REPEATS = 2.0, 3
# Items of a step where their number is not known, and tokens of a step of a language model.
ITEMS, TOKENS = 128, 2_048


class Limits(NamedTuple):
    """Amount of work that is timed.

    Attributes:
        items: largest number of items.
        product: multiplications of the product with the classes that the exact step has, at least 512 of them.
        ranked: elements of the teacher's logits that are ranked.
    """

    items: int
    product: int
    ranked: int


# A processor needs a second for them. An accelerator takes whole steps: parts of them would time the start of kernels.
PROCESSOR, ACCELERATOR = Limits(2_048, 2**28, 2**20), Limits(8_192, 2**41, 2**27)
SMALLEST_PART = 512

# Sampled classes have to be this many times faster. A smaller gain does not justify the error of an estimate, and
# timings vary by several percent.
MARGIN = 1.2


class HeadCosts(NamedTuple):
    """Milliseconds of a head step: loss and gradients, the teacher's targets given.

    Attributes:
        exact: with all classes.
        sampled: with sampled classes, ranking and sampling included.
        items: of the timed steps.
    """

    exact: float
    sampled: float
    items: int = ITEMS

    @property
    def sampling_pays(self) -> bool:
        """True if sampled classes are faster by more than ``MARGIN``."""
        return self.exact > MARGIN * self.sampled

    def __str__(self) -> str:
        return (
            f"a head step of {self.items:,} items takes about {self.exact:.3g} ms with all classes and "
            f"{self.sampled:.3g} ms with sampled classes, which have to be {MARGIN:g} times faster"
        )


def measure_costs(
    num_classes: int,
    num_features: int,
    spec: SamplerSpec,
    *,
    num_items: int = ITEMS,
    stored: TargetLayout | None = None,
    row_sparse: bool = False,
    device: torch.device | str = "cpu",
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> HeadCosts:
    """Times the parts of both steps on random data, and scales those that grow with C from a slice of the classes.

    Takes about a second on a processor, however large C is.

    Args:
        num_classes: C.
        num_features: d, the width of the features.
        spec: how classes are sampled.
        num_items: N of the run; at most 2,048 are timed on a processor, and 8,192 elsewhere.
        stored: the layout of the teacher's stored targets; None: its logits are given, and ranked.
        row_sparse: the head's gradient is to be row-sparse; a dense one is filled with C·d zeros.
        device: of the head.
        context: entered around each timed part; ``accelerator.autocast`` for mixed precision.
    """
    steps = _HeadSteps(num_classes, num_features, spec, num_items, stored, torch.device(device))

    def cost(step: Callable[[], None]) -> float:
        return _fastest(step, steps, context)

    exact = cost(steps.exact) * num_classes / len(steps.exact_weight)
    sampled = cost(steps.sampled)
    if stored is None:
        # The sampled step ranks the slice of the classes; all classes are to be ranked in its place.
        ranking = cost(steps.rank) * steps.num_items / len(steps.ranked_logits)
        sampled = max(0.0, sampled - cost(steps.rank_part)) + ranking
    if not row_sparse:
        sampled += cost(steps.fill) * num_classes / len(steps.weight)
    return HeadCosts(exact, sampled, steps.num_items)


class _HeadSteps:
    """The timed parts, on random data.

    Args:
        num_classes: C.
        num_features: d, the width of the features.
        spec: how classes are sampled.
        num_items: N of the run.
        stored: the layout of stored targets, or None.
        device: of the head.

    Attributes:
        num_items: that are timed.
        weight: of the classes that the sampled step samples from, ``[part, d]``.
        exact_weight: of the classes that the exact step computes, no more than those.
        ranked_logits: some items' logits of all classes.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        spec: SamplerSpec,
        num_items: int,
        stored: TargetLayout | None,
        device: torch.device,
    ):
        limits = PROCESSOR if device.type == "cpu" else ACCELERATOR
        values = _values(device)
        self.device, self.num_items = device, min(num_items, limits.items)
        exact_part = min(num_classes, max(SMALLEST_PART, limits.product // (self.num_items * num_features)))
        spec = spec.resolved(stored_sample_size=None if stored is None else stored.sample_size)
        sampled = spec.num_sampled_classes + (0 if stored is None else stored.depth + stored.sample_size)
        shared = spec.num_shared_classes * spec.num_tails
        part = min(num_classes, max(exact_part, 4 * (sampled + shared)))
        self.features = values(self.num_items, num_features).requires_grad_()
        self.weight = values(part, num_features).requires_grad_()
        self.exact_weight = self.weight.detach()[:exact_part].requires_grad_()
        # A chunk is as large as in the run, where it has all classes.
        self.chunk_items = min(self.num_items, chunk_items(self.num_items, num_classes, device))
        self.teacher_logits = values(self.chunk_items, part)
        self.ranked_logits = values(min(self.num_items, max(1, limits.ranked // num_classes)), num_classes)
        if stored is None:
            self.stored, self.sampler = None, make_sampler(part, spec, device=device)
            return
        self.stored = [_compact(logits, stored) for logits in self._logits()]
        self.exact_stored = _compact(self.teacher_logits[:, :exact_part], stored)
        self.sampler = make_cached_sampler(_within(stored, part), spec, device=device)

    def exact(self) -> None:
        """Loss and gradients on all classes of the slice."""
        loss, _ = exact_head_loss(self.features, self.exact_weight, None, self._answers, None, TEMPERATURE, 0.0)
        loss.sum().backward()

    def _answers(self) -> Iterator[Tensor | CachedTargets]:
        """The teacher's targets on the classes of the exact step, chunk by chunk."""
        part = len(self.exact_weight)
        for chunk in slices(self.num_items, self.chunk_items):
            size = chunk.stop - chunk.start
            logits = self.teacher_logits[:size, :part]
            yield logits if self.stored is None else _cached(self.exact_stored, part, size)

    def sampled(self) -> None:
        """Ranking, sample, loss and gradients on sampled classes of the slice."""
        with torch.no_grad():
            sample = self.sampler.sample(self._targets())
        ids = sample.item_ids, sample.tail_ids
        logits = sampled_logits(self.features, self.weight, None, *ids, True, sample.updates)
        loss, _, result = sampled_loss(logits, sample, TEMPERATURE, 0.0)
        self.sampler.learn(sample, result.signal)
        loss.sum().backward()

    def rank_part(self) -> None:
        """The ranking that the sampled step does."""
        for _ in self._targets():
            pass

    def rank(self) -> None:
        """The ranking of all C classes, for some items."""
        self._rank(self.ranked_logits)

    def fill(self) -> None:
        """A dense gradient of zeros."""
        self.weight.grad = torch.empty_like(self.weight).zero_()

    def _logits(self) -> Iterator[Tensor]:
        """The teacher's logits of each chunk, whose best-ranked classes differ from chunk to chunk."""
        for number, chunk in enumerate(slices(self.num_items, self.chunk_items)):
            yield self.teacher_logits[: chunk.stop - chunk.start].roll(101 * number, 1)

    def _targets(self) -> Iterator[TeacherTargets | CachedTargets]:
        if self.stored is None:
            return map(self._rank, self._logits())
        return (_cached(stored, len(self.weight)) for stored in self.stored)

    def _rank(self, logits: Tensor) -> TeacherTargets:
        return TeacherTargets(logits, TEMPERATURE, self.sampler.rank_depth)


def _within(layout: TargetLayout, num_classes: int) -> TargetLayout:
    """The same layout for fewer classes."""
    depth = min(layout.depth, num_classes)
    return TargetLayout(num_classes, depth, layout.sample_size if depth < num_classes else 0)


def _compact(logits: Tensor, layout: TargetLayout) -> CompactTargets:
    """The stored targets of some items, in a layout for more classes or as many."""
    layout = _within(layout, logits.shape[1])
    generator = torch.Generator().manual_seed(0)
    return compact_targets(logits, TEMPERATURE, layout.depth, layout.sample_size, generator)


def _cached(stored: CompactTargets, num_classes: int, num_items: int | None = None) -> CachedTargets:
    return CachedTargets(CompactTargets(*(part[:num_items] for part in stored)), num_classes)


def _values(device: torch.device) -> Callable[..., Tensor]:
    """Makes tensors of random numbers, which repeat: an accelerator's own generator belongs to the run."""
    some = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).to(device)

    def values(*shape: int) -> Tensor:
        return some.repeat(ceil(prod(shape) / len(some)))[: prod(shape)].view(shape)

    return values


def _fastest(step: Callable[[], None], steps: _HeadSteps, context: Callable[[], AbstractContextManager]) -> float:
    """Milliseconds of the fastest of several runs of a step, after a first run that is not counted."""
    times = []
    for _ in range(1 + REPEATS):
        steps.features.grad = steps.weight.grad = steps.exact_weight.grad = None
        with torch.enable_grad(), context():
            times.append(_milliseconds(step, steps.device))
    return min(times[1:])


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1000 * (time.perf_counter() - started)
