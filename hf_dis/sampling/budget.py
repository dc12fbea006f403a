"""The budget of a sample: K and K_t that follow the error of the gradient, which is estimated from the sample."""

from __future__ import annotations

import warnings
from math import inf, log2
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_dis.sampler_spec import UPDATED_SHARE

if TYPE_CHECKING:
    from hf_dis.arguments import DISArguments
    from hf_dis.sampling.sampler import ClassSampler

# Batches from one measurement of the error to the next.
BATCHES = 10

# What is known keeps this share at each measurement: a single measurement is off by a tenth.
DECAY = 0.5

# A sample shrinks once the smaller one is expected to have this share of the accepted error. The distance to the error
# at which it grows keeps the sizes constant under the noise of the measurement.
CALM = 0.8

# The smallest tail is this share of the default. A sample with more than half of the classes costs as much as all of
# them.
SMALLEST, LARGEST = 1 / 4, 1 / 2


class Sizes(NamedTuple):
    """Classes that a step samples.

    Attributes:
        num_sampled: K, per item.
        num_shared: K_t, of a shared tail; 0 without one.
    """

    num_sampled: int
    num_shared: int


class Variances(NamedTuple):
    """Squared errors and squared length of the gradient, summed over items.

    Attributes:
        ranked: squared error by the classes that items sample of their own.
        shared: squared error by the classes of the shared tail.
        length: of the exact gradient.
    """

    ranked: float
    shared: float
    length: float

    def at(self, old: Sizes, new: Sizes, is_whole: bool) -> Variances:
        """The variances that a sample of other sizes is expected to have; the error of n classes falls as 1/n.

        Args:
            old: sizes at which they were measured.
            new: other sizes.
            is_whole: all ranks that items sample from are certain with the new sizes.
        """
        own, shared = (before / after if after else 1.0 for before, after in zip(old, new, strict=True))
        return Variances(0.0 if is_whole else own * self.ranked, shared * self.shared, self.length)

    @property
    def error(self) -> float:
        """‖ĝ - g‖ / ‖g‖; infinite if the gradient is lost in its noise."""
        return ((self.ranked + self.shared) / self.length) ** 0.5 if self.length > 0 else inf


class Budget:
    """Chooses K and K_t by powers of two, so that the gradient's error is the accepted one with the fewest classes.

    The error is measured at every ``BATCHES``-th batch. A larger sample is taken as soon as the error is above the
    accepted one, and a smaller one once its expected error is below ``CALM`` times the accepted one. K_t changes by a
    factor of two at a time. Where no sample keeps the accepted error, all classes are computed, and the sampler
    continues to learn. Classes are sampled again once the largest sample is expected to keep the error.

    Args:
        accepted: relative error ‖ĝ - g‖ / ‖g‖ of the gradient on the head's input, above 0.
        sampled: the sizes K to choose from, ascending; one if K is fixed.
        shared: the sizes K_t to choose from, ascending, and U with each; one if K_t is fixed, 0 without a shared tail.
        start: the first sizes.
        num_ranks: ranks that items sample from; with so many classes all of them are certain. None: they never are.

    Attributes:
        sizes: that the next batch has.
        wants_all_classes: no sample keeps the accepted error.
    """

    def __init__(
        self,
        accepted: float,
        sampled: tuple[int, ...],
        shared: dict[int, int | None],
        start: Sizes,
        num_ranks: int | None,
    ):
        self.accepted, self.sampled, self.num_ranks = accepted, sampled, num_ranks
        self.shared, self._updated = tuple(shared), shared
        self.sizes, self.wants_all_classes = start, False
        self._known: Variances | None = None  # at the present sizes
        self._batches = 0

    @property
    def num_updated(self) -> int | None:
        """U: the classes per item that update a row-sparse head, with the present sizes; None: all of them."""
        return self._updated[self.sizes.num_shared]

    def is_due(self) -> bool:
        """Counts a batch, and returns True if the error is to be measured with it."""
        self._batches += 1
        return (self._batches - 1) % BATCHES == 0

    def observe(self, measured: Variances) -> None:
        """Takes a measurement of all processes, and chooses the next sizes.

        Args:
            measured: with the present sizes; a NaN has no effect.
        """
        if not sum(measured) < inf:
            return
        known = self._known or measured
        self._known = Variances(*(DECAY * old + (1 - DECAY) * new for old, new in zip(known, measured, strict=True)))
        chosen = self._chosen()
        self.wants_all_classes = chosen is None
        new = Sizes(self.sampled[-1], self.shared[-1]) if chosen is None else chosen
        self._known, self.sizes = self._expected(new), new

    def _expected(self, sizes: Sizes) -> Variances:
        return self._known.at(self.sizes, sizes, self.num_ranks is not None and sizes.num_sampled >= self.num_ranks)

    def _chosen(self) -> Sizes | None:
        """The fewest classes that keep the error, within a factor of two, or None: all classes."""
        near = [size for size in self.shared if self.sizes.num_shared <= 2 * size <= 4 * self.sizes.num_shared]
        choices = sorted((Sizes(own, size) for own in self.sampled for size in near), key=sum)
        for sizes in choices:
            is_smaller = self.wants_all_classes or sum(sizes) < sum(self.sizes)
            if self._expected(sizes).error <= self.accepted * (CALM if is_smaller else 1):
                return sizes
        return choices[-1] if choices[-1].num_shared < self.shared[-1] else None

    def state_dict(self) -> dict[str, Tensor]:
        """Sizes, the batches so far, and what is known of the variances: ``budget``, ``[7]``."""
        known = self._known or (float("nan"),) * 3
        values = *self.sizes, self.wants_all_classes, self._batches, *known
        return {"budget": torch.tensor(values, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a state that :meth:`state_dict` returned."""
        own, shared, wants_all, batches, *known = state["budget"].tolist()
        self.sizes, self.wants_all_classes, self._batches = Sizes(int(own), int(shared)), bool(wants_all), int(batches)
        self._known = None if known[0] != known[0] else Variances(*known)


def make_budget(arguments: DISArguments, sampler: ClassSampler) -> Budget | None:
    """Makes the budget of a sampler, which starts with the sampler's sizes; sizes that were given by hand are fixed.

    Args:
        arguments: the settings, with ``gradient_error``.
        sampler: with the default sizes.

    Returns:
        the budget; None, with a warning, if all sizes were given.
    """
    start, most = Sizes(sampler.num_sampled, sampler.num_shared), LARGEST * sampler.proposal.num_classes
    own, shared, num_updated = (start.num_sampled,), (start.num_shared,), sampler.num_updated
    if arguments.num_sampled_classes is None and start.num_sampled:
        bounds = (own[0], sampler.num_ranks) if start.num_shared else (SMALLEST * own[0], most)
        own = powers_of_two(own[0], *bounds)
    if arguments.num_shared_classes is None and start.num_shared:
        shared = powers_of_two(shared[0], SMALLEST * shared[0], most)
    updated = dict.fromkeys(shared, num_updated)
    if num_updated is not None and arguments.num_updated_classes is None:
        updated = {size: max(num_updated, size // UPDATED_SHARE) for size in shared}
    if len(own) == len(shared) == 1:
        warnings.warn(
            f"gradient_error is {arguments.gradient_error}, and has no effect on the numbers of classes, which are "
            "given by hand: leave num_sampled_classes and num_shared_classes out, or gradient_error",
            UserWarning,
            stacklevel=2,
        )
        return None
    return Budget(
        arguments.gradient_error, own, updated, start, sampler.num_ranks if sampler.design == "pps" else None
    )


def powers_of_two(default: int, lowest: float, highest: float) -> tuple[int, ...]:
    """The sizes ``default * 2**k`` within two bounds, ascending; the default is always among them.

    Args:
        default: 1 or more.
        lowest, highest: the bounds, above 0.
    """
    down = max(0, int(log2(default / lowest))) if lowest < default else 0
    up = max(0, int(log2(highest / default))) if highest > default else 0
    sizes = [default // 2**power for power in range(down, 0, -1)]
    return *(size for size in sizes if size >= 1), *(default * 2**power for power in range(up + 1))
