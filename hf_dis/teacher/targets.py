"""TeacherTargets: a teacher's ranked answers, the interface between a teacher and the sampler and losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product
from math import gcd, log

import torch
from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.teacher.logit_checks import check_teacher_logits
from hf_dis.teacher.ranking import GROUP, Candidates, best_groups, group_members, num_groups, top_ranked

# Elements of the [n, C] logits of a chunk: 64 MiB in float32.
CHUNK_ELEMENTS = 2**24

# Elements that a pass over items takes at a time on CPU, so that its results stay in the cache.
BLOCK_ELEMENTS = 2**18

# Elsewhere the number of parts is fixed, so that launches do not grow with the work, between the least and the most
# elements of a part. 2^26 elements keep a device busy; 2^30 are 2 GiB in bfloat16.
# Kernels hold little beside the logits of a chunk, so that fewer chunks need no more memory.
DEVICE_CHUNKS, DEVICE_BLOCKS, BLOCKS_OF_CHUNK, KERNEL_CHUNKS = 7, 16, 4, 5
# Blocks that take turns at the items, where this number of blocks and more fits: the first of them holds all counted
# items, whose exponentials need no second pass. Turns among all items of a batch would reach beyond 32-bit offsets.
TURNS = 4
# Chunks for a loss on all classes, which holds a block of the student's logits beside each.
ALL_CLASSES_CHUNKS = 8
LEAST_ELEMENTS, MOST_ELEMENTS = 2**26, 2**30
# A multiple of the usual numbers of tails, so that a chunk starts with the first tail.
ITEMS_OF_CHUNK = 16

# Items of which one is counted in the class mass on an accelerator, where a pass over all logits is what a step costs.
# 128 items and more remain: the class mass shapes a proposal that is a running mean over steps.
MASS_STRIDE, MASS_ITEMS = 32, 128


def widen(logits: Tensor) -> Tensor:
    """Converts logits to float32; wider logits are returned as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def block_items(values: Tensor, blocks: int = DEVICE_BLOCKS) -> int:
    """Counts the items of ``[n, C]`` that a pass takes at a time.

    On a CPU the items of a block stay in its cache.

    Args:
        values: that the pass reads.
        blocks: the most of them elsewhere, up to a size of 2^30.
    """
    num_items, num_classes = values.shape
    if values.device.type == "cpu":
        return max(1, BLOCK_ELEMENTS // max(1, num_classes))
    return _part(num_items, num_classes, blocks)


def chunk_items(num_items: int, num_classes: int, device: torch.device, chunks: int | None = None) -> int:
    """Counts the items of a chunk of logits that exist at a time.

    On a CPU a chunk has 2^24 logits. Elsewhere their number has a bound up to a size of 2^30.

    Args:
        num_items: N.
        num_classes: C.
        device: of the logits.
        chunks: the most of them on an accelerator; None: as many as suit a device with or without kernels.
    """
    if device.type == "cpu":
        return max(1, CHUNK_ELEMENTS // num_classes)
    if chunks is None:
        chunks = KERNEL_CHUNKS if uses_triton(device) else DEVICE_CHUNKS
    multiple = max(ITEMS_OF_CHUNK, mass_stride(num_items))
    return -(-_part(num_items, num_classes, chunks) // multiple) * multiple


def mass_stride(num_items: int) -> int:
    """Counts the items of which the class mass counts one on an accelerator: a power of two from 1 to 32.

    Args:
        num_items: of the batch.
    """
    return 1 << max(1, min(MASS_STRIDE, num_items // MASS_ITEMS)).bit_length() - 1


def _part(num_items: int, num_classes: int, number: int) -> int:
    """Divides items into parts, as many as given or fewer; more where a part would be too large."""
    least, most = (max(1, elements // max(1, num_classes)) for elements in (LEAST_ELEMENTS, MOST_ELEMENTS))
    return min(max(least, -(-num_items // number)), most)


class TeacherTargets:
    """Ranks the logits of a teacher to a depth, at a temperature.

    Args:
        logits: of the teacher, ``[n, C]``.
        temperature: τ > 0.
        depth: m, the ranks to resolve; at most C are resolved.
        blocks: the most passes over parts of the logits on an accelerator.
        num_items: of the batch that these items are a chunk of; None: they are all of it.

    Attributes:
        logits, temperature: as given.
        counted: the items that :meth:`class_mass` counts: all on a CPU, one of 8 in a batch of
            1,024 elsewhere, and one of 32 in a batch of 4,096 or more.
        is_whole: the logits of all classes are on this process.
    """

    is_whole = True

    def __init__(
        self,
        logits: Tensor,
        temperature: float,
        depth: int,
        blocks: int = DEVICE_BLOCKS,
        num_items: int | None = None,
    ):
        self.logits, self.temperature = logits, temperature
        on_cpu, num_items = logits.device.type == "cpu", num_items or len(logits)
        self.counted = slice(0, len(logits), 1 if on_cpu else mass_stride(num_items))
        self._blocks = blocks
        self._mass: Tensor | None = None
        self._depth = min(depth, logits.shape[1])
        self._found: tuple[Tensor, Candidates] | None = None
        if on_cpu:  # elsewhere computed with the first answers that are asked for
            candidates = Candidates(*top_ranked(logits, self._depth), logits.shape[1])
            normaliser = self._normalised_in_cache(widen(candidates.logits[:, :1]), block_items(logits, blocks))
            self._found = normaliser.T, candidates

    @cached_property
    def log_normaliser(self) -> Tensor:
        """log Σ exp(logit / τ), ``[n, 1]``, float32 or wider."""
        return -_minus_normaliser(self.normaliser) if len(self.normaliser) > 1 else self.normaliser.T

    @property
    def normaliser(self) -> Tensor:
        """log Σ exp(logit / τ), ``[1, n]``; or Σ exp(logit / τ + offset) and the offsets, ``[2, n]``.

        The function :func:`log_probs_by_parts` takes both, for all chunks at a time.
        """
        return self._answers[0]

    @property
    def candidates(self) -> Candidates:
        """The logits among which the m best-ranked ones are."""
        return self._answers[1]

    @property
    def _answers(self) -> tuple[Tensor, Candidates]:
        if self._found is None:
            if uses_triton(self.logits.device):
                self._found = self._found_by_kernels()
            else:
                self._mass = self._find_by_blocks()
        return self._found

    def _found_by_kernels(self) -> tuple[Tensor, Candidates]:
        from hf_dis.teacher.triton_normaliser import log_normaliser

        logits, depth, groups = self.logits, self._depth, num_groups(self.logits.shape[1], self._depth)
        normaliser, maxima = log_normaliser(logits, self.temperature, groups, GROUP)
        if groups and logits.dtype != torch.float64:
            from hf_dis.teacher.triton_ranking import best_places, rank_groups

            best = best_places(maxima, depth)
            del maxima  # an eighth of the logits
            ranked = rank_groups(logits, best, groups, GROUP)
        else:
            best = maxima.topk(depth, dim=1, sorted=False).indices if groups else None
            ranked = top_ranked(logits, depth, best)
        return normaliser.T, Candidates(*ranked, logits.shape[1])

    def columns(self, tail_ids: Tensor, labels: Tensor | None, first_item: int) -> Tensor:
        """Computes by kernels the log-probabilities of ranked classes, shared tails and labels, side by side.

        Args:
            tail_ids: classes of each tail, ``[G, K_t]``; item i of all uses tail ``i mod G``.
            labels: class ids of all items, ``[N]``, or None.
            first_item: the number of the first of these items.
        """
        from hf_dis.teacher.triton_ranking import answers_at, answers_of_items

        logits, temperature, asked = self.logits, self.temperature, (tail_ids, labels, first_item)
        if self._found is None and num_groups(logits.shape[1], self._depth) and logits.dtype != torch.float64:
            normaliser, _, _, *ranked, columns = answers_of_items(logits, temperature, self._depth, GROUP, *asked)
            self._found = normaliser.T, Candidates(*ranked, logits.shape[1])
            return columns
        return answers_at(logits, self.highest, self.log_normaliser, *asked, temperature)

    def _best_candidates(self, depth: int) -> tuple[Candidates, Tensor]:
        """The candidates, ranked later for all chunks at a time, and the highest logit of each item, ``[n, 1]``."""
        logits, num_classes = self.logits, self.logits.shape[1]
        if not num_groups(num_classes, depth):
            ranked = logits.topk(depth, dim=1)
            return Candidates(*ranked, num_classes), ranked[0][:, :1]
        maxima, best = best_groups(logits, depth)
        members = group_members(logits, best)
        return Candidates(members, best, num_classes), (
            members.amax(1, keepdim=True) if num_classes % GROUP else maxima[:, :1]
        )

    def _normalised_in_cache(self, highest: Tensor, items: int) -> Tensor:
        """A single pass of exponentials over all classes gives the normaliser and the mass of each class."""
        self._mass, totals, scale = highest.new_zeros(self.logits.shape[1]), [], 1 / (log(2) * self.temperature)
        for part, offset in zip(self.logits.split(items), (highest * -scale).split(items), strict=True):
            # Powers of two, since torch takes e^x from MKL: on an AMD processor that is six times as slow as 2^x.
            exponentials = torch.add(offset, part, alpha=scale).exp2_()
            totals.append(exponentials.sum(1))
            self._mass.addmv_(exponentials.T, totals[-1].reciprocal())
            del exponentials  # the next block is computed without this one in memory
        return highest / self.temperature + torch.cat(totals)[:, None].log_()

    def _find_by_blocks(self, mass: Tensor | None = None) -> Tensor:
        """Finds all answers, three launches per block for the normaliser; returns the class mass, added to a mass."""
        logits, (candidates, peaks) = self.logits, self._best_candidates(self._depth)
        found = peaks.new_empty(2, len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        totals, offsets = found[0], found[1, :, None]
        # Any number near it will do: rounded as logits are, but float16 might overflow.
        peaks = widen(peaks) if logits.dtype == torch.float16 else peaks
        torch.mul(peaks, -1 / self.temperature, out=offsets)
        for items, counted in self._turns():
            exponentials = _shifted(logits[items], offsets[items], self.temperature).exp_()
            torch.sum(exponentials, 1, out=totals[items])
            if counted is not None:
                beta, mass = (0, totals.new_empty(logits.shape[1])) if mass is None else (1, mass)
                # Autocast would round a product without out.
                given = mass, exponentials[counted].T, totals[items][counted].reciprocal()
                mass = torch.addmv(*given, alpha=self.items_per_counted, beta=beta, out=torch.empty_like(mass))
                del given
            del exponentials  # the next block is computed without this one in memory
        self._found = found, candidates
        return totals.new_zeros(logits.shape[1]) if mass is None else mass

    def _turns(self) -> Iterator[tuple[slice, slice | None]]:
        """The items of each block, which take turns; and those of the block that the class mass counts, if any."""
        number, size, step = len(self.logits), block_items(self.logits, self._blocks), self.counted.step
        turns = min(TURNS, 1 << (-(-number // size) - 1).bit_length())
        for first, turn in product(range(0, number, turns * size), range(turns)):
            items = range(first + turn, min(first + turns * size, number), turns)
            counted = next((place for place, item in enumerate(items[:step]) if item % step == 0), None)
            if items:
                of_block = None if counted is None else slice(counted, None, step // gcd(turns, step))
                yield slice(items.start, items.stop, turns), of_block

    @cached_property
    def _ranked(self) -> tuple[Tensor, Tensor]:
        return self.candidates.ranked()

    @property
    def highest(self) -> Tensor:
        """Logits of the m best-ranked classes, best first, in the type of the logits, ``[n, m]``."""
        return self._ranked[0]

    @property
    def ids(self) -> Tensor:
        """The m best-ranked classes, best first, ``[n, m]``."""
        return self._ranked[1]

    def check_finite(self, first_item: int) -> None:
        """Raises an error as :func:`check_teacher_logits`; on a processor the normalisers save a pass over logits."""
        if self.logits.device.type != "cpu" or not self.log_normaliser.isfinite().all():
            check_teacher_logits(self.logits, self.logits.shape[1], first_item)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def items_per_counted(self) -> float:
        """Items that each counted item stands for, 1 to 32."""
        return max(1, len(self)) / max(1, len(range(len(self))[self.counted]))

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of the ranked classes at τ, ``[n, m]``, float32 or wider."""
        return log_probs(self.highest, self.log_normaliser, self.temperature)

    def all_classes(self) -> Tensor:
        """Returns the teacher's targets for a loss on all classes: the logits, ``[n, C]``."""
        return self.logits

    def logits_at(self, ids: Tensor) -> Tensor:
        """Returns the logits of any classes of each item, ``[n, K]`` for class ids ``[n, K]``."""
        return self.logits.gather(1, ids)

    def log_prob(self, ids: Tensor) -> Tensor:
        """Computes log-probabilities at τ of any classes of each item, ``[n, K]`` for class ids ``[n, K]``."""
        return log_probs(self.logits_at(ids), self.log_normaliser, self.temperature)

    def class_mass(self, added: Tensor | None = None) -> Tensor:
        """Sums the probability of each class over the counted items, times :attr:`items_per_counted`, ``[C]``.

        Without kernels an accelerator finds the normaliser in the same passes: ask for the mass first.

        Args:
            added: the mass of other items, ``[C]``, which is added.
        """
        if self._mass is not None:
            return self._mass if added is None else added + self._mass
        if uses_triton(self.logits.device):
            from hf_dis.teacher.triton_normaliser import class_mass

            counted = (values[self.counted] for values in (self.logits, self.log_normaliser))
            mass = class_mass(*counted, self.temperature, self.items_per_counted, added)
        else:
            mass = self._find_by_blocks(added)
        if added is None:  # kept for targets that serve several steps
            self._mass = mass
        return mass


def log_probs_by_parts(logits: Tensor, parts: Sequence[Tensor], temperature: float) -> Tensor:
    """Computes log-probabilities at τ as :func:`log_probs`, with the normalisers of consecutive chunks of items.

    Args:
        logits: of any classes, ``[N, K]``.
        parts: of each chunk, as :attr:`TeacherTargets.normaliser`.
        temperature: τ > 0.
    """
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if len(joined) == 1:
        return log_probs(logits, joined.T, temperature)
    return _shifted(logits, _minus_normaliser(joined), temperature)


def _minus_normaliser(sums: Tensor) -> Tensor:
    """-log Σ exp(logit / τ), ``[n, 1]``, from sums with offsets, ``[2, n]``."""
    totals, offsets = sums[:, :, None]
    return offsets - totals.log()


def log_probs(logits: Tensor, log_normaliser: Tensor, temperature: float) -> Tensor:
    """Computes log-probabilities at τ, ``[n, K]``, float32 or wider.

    Args:
        logits: of any classes, ``[n, K]``.
        log_normaliser: log Σ exp(logit / τ) over all classes, ``[n, 1]``, float32 or wider.
        temperature: τ > 0.
    """
    if logits.device.type == "cpu":
        return widen(logits) / temperature - log_normaliser
    return _shifted(logits, -log_normaliser, temperature)


def _shifted(logits: Tensor, offset: Tensor, temperature: float) -> Tensor:
    """Computes ``logits / τ + offset`` in the type of the offset, in one launch that widens."""
    return torch.add(offset, logits, alpha=1 / temperature)
