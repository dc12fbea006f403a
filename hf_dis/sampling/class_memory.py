"""The dynamic proposal over classes, for the tails that items share. The class memory is this project's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.precision import widest
from hf_dis.sampling.sample import Statistics, StepClasses
from hf_dis.sampling.tails import ClassDensity

if TYPE_CHECKING:
    from hf_dis.head.vocab_shard import VocabShard

# Points at which a class mass is sampled where it is sent: 96 KiB. A mass of three times as many classes is as large.
MASS_POINTS = 2**13

# Classes for each step that a density serves. A density over 16 million classes serves 4 steps: its passes over all
# classes cost a step no more than those of 4 million classes.
CLASSES_PER_STEP = 2**22

# Of the marginal, before a pass over all classes makes the scale 1 again.
LEAST_SCALE = 1e-6

# The parts of a state that have a row for each class; the last one where a density serves several steps.
CLASS_STATE = ("class_squared_signal", "class_marginal", "class_density")


def sent_mass(mass: Tensor, generator: torch.Generator, is_of_shard: bool) -> Tensor:
    """Makes the mass that a process sends: a sample where that is less, so that its size does not grow with C.

    Args:
        mass: as for :func:`sampled_mass`.
        generator: a CPU generator.
        is_of_shard: processes keep the classes together. If False, each keeps all classes: a dense mass is sent up to
            four times the size of the samples of all processes, since its sum is sent by parts.
    """
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not is_of_shard and (processes == 1 or len(mass) <= 12 * MASS_POINTS * processes):
        return mass
    return sampled_mass(mass, generator)


def sampled_mass(mass: Tensor, generator: torch.Generator) -> Tensor:
    """Samples a mass over classes at a fixed number of points, so that its size does not grow with C.

    The sample is systematic in the mass: each class has its mass on average, and an error below the total divided by
    the number of points. tests/sampling/test_sampled_mass.py measures 50,000 classes, 32 items and one process. A sum
    over the tail then has 0.5% more variance by the "dis" proposal, and 12% more by the "teacher" proposal.

    Args:
        mass: ``[C]``; below 0 by rounding alone, which counts as 0. Dense, or sparse and not coalesced.
        generator: a CPU generator.

    Returns:
        sparse, ``[C]``, not coalesced; or the mass, dense, where it is not larger than its sample.
    """
    if len(mass) <= 3 * MASS_POINTS:
        return mass.to_dense()
    start = torch.rand((), dtype=torch.float64, generator=generator)
    shape, values, entries = mass.shape, mass, None
    if mass.is_sparse:  # a class without an entry adds nothing to the cumulative sum; the last class has one
        ids, values = mass._indices()[0], mass._values()
        given = torch.cat([ids, ids.new_tensor([len(mass) - 1])]), torch.cat([values, values.new_zeros(1)])
        mass = torch.sparse_coo_tensor(given[0][None], given[1], shape, check_invariants=False).coalesce()
        entries, values = mass._indices()[0], mass._values()
    cumulative = values.clamp_min(0).cumsum(0, dtype=widest(mass.device))
    share = cumulative[-1] / MASS_POINTS
    steps = (start + torch.arange(MASS_POINTS, dtype=torch.float64)).to(mass.device, cumulative.dtype)
    ids = torch.searchsorted(cumulative, steps * share, right=True).clamp_(max=len(values) - 1)
    if entries is not None:
        ids = entries[ids]
    values = share.to(torch.float32).expand(MASS_POINTS)
    return torch.sparse_coo_tensor(ids[None], values, shape, check_invariants=False)


class ClassMemory:
    """A density over classes by the disagreement of teacher and student outside the items' ranked classes.

    Keeps a running mean of the squared signal, renewed only at sampled classes. Also keeps the teacher's running class
    marginal, which is known for every class and follows the data at once.

    The density over more than 2^22 classes serves several steps. Inclusion probabilities are those of the density that
    was sampled from, so that the sample stays unbiased. The number of steps follows from C alone: any number of
    processes samples alike.

    Args:
        num_classes: C.
        decay: of the marginal's running mean, in [0, 1).
        device: of the teacher's targets.
        shard: the classes that are kept here, where other processes keep all other classes; None: all are kept here.

    Attributes:
        squared_signal, marginal: the running means of the classes that are kept here, ``[S]``. Where a density serves
            several steps, the mean of the marginal is ``marginal * marginal_scale``.
    """

    # Share of a new value in the running mean. A class is sampled rarely, so that a new value has to count at once.
    RENEWAL = 0.3

    def __init__(
        self, num_classes: int, decay: float, device: torch.device | str = "cpu", shard: VocabShard | None = None
    ):
        self.num_classes, self.decay, self.shard = num_classes, decay, shard
        number = num_classes if shard is None else len(shard)
        # An untrained student is close to uniform, so that its signal is about 1/C everywhere.
        self.squared_signal = torch.full((number,), num_classes**-2.0, device=device)
        self.marginal = torch.zeros(number, device=device)
        self._sums = torch.zeros(number, 2, device=device)  # zero between updates
        self._zero = torch.zeros((), device=device)
        self.steps_per_density = -(-num_classes // CLASSES_PER_STEP)
        self.marginal_scale = torch.ones((), device=device)
        if self.steps_per_density > 1:
            self._density = ClassDensity(torch.zeros(number, dtype=widest(device), device=device))
            self._density_age = self.steps_per_density  # in steps that were learnt from: the first call renews it

    def density(self, floor: float, signal_share: float = 0.5) -> ClassDensity:
        """Signal and marginal, each normalised, mixed, and a uniform share, in the widest type of the device.

        Where processes keep the classes together, every process has to call this with the same shares in every step.

        Args:
            floor: the uniform share, in (0, 1].
            signal_share: share of the signal in the rest, in [0, 1].
        """
        if self.steps_per_density == 1:
            return self._mixed(floor, signal_share)
        if self._density_age >= self.steps_per_density:
            self._scale_marginal()
            # Without its total, which a checkpoint does not have.
            self._density, self._density_age = ClassDensity(self._mixed(floor, signal_share).values), 0
        return self._density

    def _mixed(self, floor: float, signal_share: float) -> ClassDensity:
        dtype = widest(self.marginal.device)
        if self.shard is None and uses_triton(self.marginal.device):
            from hf_dis.sampling.triton_tails import class_density, class_sums

            means = self.squared_signal, self.marginal
            shares = [(1 - floor) * signal_share, (1 - floor) * (1 - signal_share), floor / len(self.marginal)]
            return ClassDensity(*class_density(*means, class_sums(*means, dtype), shares))
        signal = self.squared_signal.sqrt()
        sums = [signal.sum(dtype=dtype), self.marginal.sum(dtype=dtype)]
        if self.shard is not None:
            sums = list(self.shard.sum(torch.stack(sums)).unbind())
        sums = torch._foreach_clamp_min(sums, 1e-30)
        mixed = torch.addcdiv(self._zero, signal, sums[0], value=(1 - floor) * signal_share)
        mixed.addcdiv_(self.marginal, sums[1], value=(1 - floor) * (1 - signal_share))
        uniform = floor / self.num_classes
        return ClassDensity(torch.add(mixed, uniform, out=torch.empty_like(mixed, dtype=dtype)))

    def statistics(self, sample: StepClasses, signal: Tensor) -> Statistics:
        """Sums over the items of a step.

        Returns:
            ``tail``, sparse ``[C, 2]``, not coalesced, and ``class_mass`` ``[C]``, the teacher's mass of every class.
            An entry of ``tail`` is of a shared class and of the items with this class outside their ranked classes.
            The entry holds the sum of the squared signal over these items, and their number.
        """
        num_shared = sample.tail_ids.shape[1]
        shape = self.num_classes, 2
        met = sample.tail_sums(signal[:, signal.shape[1] - num_shared :])
        return {
            "tail": torch.sparse_coo_tensor(sample.tail_ids.reshape(1, -1), met, shape, check_invariants=False),
            "class_mass": sample.class_mass,
        }

    def update(self, statistics: Statistics) -> None:
        """Takes the statistics of a step into the running means.

        Args:
            statistics: ``tail`` and ``class_mass`` as :meth:`statistics` gives them, ``items`` and ``not_finite``, the
                numbers of items with and without a finite signal, all summed over processes. ``class_mass`` may be
                sparse.
        """
        tail, mass = statistics["tail"], statistics["class_mass"]
        ids, values = self._kept(tail)
        if self.steps_per_density > 1:
            self._density_age += 1
            # Of a smaller scale the inverse would lose the marginal's digits.
            if mass.is_sparse and self.decay**self._density_age >= LEAST_SCALE:
                self._renew_signal(ids, values)
                self._add_to_marginal(*self._kept(mass), statistics["items"] + statistics["not_finite"])
                return
            self._scale_marginal()
        if mass.is_sparse:
            mass = torch.zeros_like(self.marginal).index_add_(0, *self._kept(mass))
        elif self.shard is not None:
            mass = mass[self.shard.start : self.shard.stop]
        if self.shard is None and uses_triton(ids.device):
            from hf_dis.sampling.triton_steps import step_classes, step_marginal

            step_classes(ids, self._sums.index_add_(0, ids, values), self.squared_signal, self.RENEWAL)
            given = mass, statistics["items"], statistics["not_finite"]
            step_marginal(*given, self.marginal, 1 - self.decay)
            return
        self._renew_signal(ids, values)
        # The marginal is of the teacher alone: items without a finite signal count too.
        num_items = statistics["items"] + statistics["not_finite"]
        marginal = (mass / num_items).float().clamp_min_(0)
        # A step without an item changes nothing: 0 / 0 is NaN.
        marginal = torch.where(marginal < torch.inf, marginal, self.marginal)
        self.marginal.lerp_(marginal, 1 - self.decay)

    def _renew_signal(self, ids: Tensor, values: Tensor) -> None:
        # A class of several tails or processes is summed; each of its entries then finds the same sum.
        sums = self._sums.index_add_(0, ids, values).index_select(0, ids)
        self._sums.index_fill_(0, ids, 0)
        squared, items = sums.unbind(1)
        known = self.squared_signal.index_select(0, ids)
        renewal = items.clamp_max(self.RENEWAL)  # 0 without an item
        self.squared_signal.index_copy_(0, ids, known.lerp_(squared / items.clamp_min(1), renewal))

    def _scale_marginal(self) -> None:
        self.marginal.mul_(self.marginal_scale)
        self.marginal_scale.fill_(1)

    def _add_to_marginal(self, ids: Tensor, mass: Tensor, num_items: Tensor) -> None:
        """Takes the mass of some classes into the marginal, without a pass over all classes.

        Args:
            ids: of the classes that are kept here, by their number here; a class may have several entries.
            mass: of the entries, summed over items.
            num_items: of the step, over processes.
        """
        renewal = num_items.clamp(max=1 - self.decay)
        self.marginal_scale.mul_(1 - renewal)
        added = (mass / num_items.clamp_min(1)).float().clamp_min_(0)
        added = torch.where(added < torch.inf, added, self._zero)
        self.marginal.index_add_(0, ids, added.mul_(renewal / self.marginal_scale))

    def _kept(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of sparse entries ``[C, ...]`` that are kept here, by their number here, and their values."""
        ids, values = entries._indices()[0], entries._values()
        if self.shard is None:
            return ids, values
        is_kept = (ids >= self.shard.start) & (ids < self.shard.stop)
        return ids[is_kept] - self.shard.start, values[is_kept]

    def state_dict(self) -> dict[str, Tensor]:
        """Both running means of the classes that are kept here; with a density that serves several steps, that too."""
        state = dict(zip(CLASS_STATE, (self.squared_signal, self.marginal), strict=False))
        if self.steps_per_density == 1:
            return state
        kept = {"class_density": self._density.values, "marginal_scale": self.marginal_scale}
        return state | kept | {"density_age": torch.tensor(self._density_age)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a state that :meth:`state_dict` returned."""
        if self.steps_per_density > 1:
            self._density = ClassDensity(torch.empty_like(self._density.values))  # not the one that was sampled from
            self._density_age = int(state["density_age"])
        for name, values in self.state_dict().items():
            values.copy_(state[name])
