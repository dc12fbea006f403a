"""Shared tails: classes that are sampled once per step for many items, and how items find them.

A step has G tails of K_t classes, and item i uses tail ``i mod G``. The shared tails are this project's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.precision import widest
from hf_dis.sampling.designs import below_one, to_device

# Classes per group in largest_densities.
GROUP = 64


class ClassDensity(NamedTuple):
    """A density over classes, not necessarily normalised.

    Attributes:
        values: positive, ``[C]``; ``[S]`` where a process has a shard of the classes.
        total: their sum, a scalar, where it came with the values; None elsewhere.
    """

    values: Tensor
    total: Tensor | None = None


class Tails(NamedTuple):
    """The tails of a step: item i uses tail ``i mod G``.

    Attributes:
        ids: class ids, distinct and ascending in each tail, ``[G, K_t]``.
        inclusion: π of these classes, in the widest type of the device, ``[G, K_t]``.
    """

    ids: Tensor
    inclusion: Tensor

    def columns(self, outside: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Makes the columns of each item, ``[N, K_t]`` each: :meth:`log_weights`, and true where π is 1."""
        return self.log_weights(outside, labels), of_items(self.inclusion >= 1, 0, len(outside))

    def log_weights(self, outside: Tensor, labels: Tensor | None) -> Tensor:
        """Computes log ω of the columns of each item, -inf where another column holds the class, ``[N, K_t]``.

        Args:
            outside: true for classes that the item has in no other column, ``[N, K_t]``.
            labels: class ids ``[N]``, which have a column of their own; None: there is none.
        """
        num_items, num_tails = len(outside), len(self.ids)
        if labels is None:
            unused = ~outside
        else:
            is_label = self.ids == in_turns(labels, num_tails)[:, :, None]
            unused = outside <= is_label.flatten(0, 1)[:num_items]  # not outside, or the label
        log_weights = torch.empty_like(self.inclusion, dtype=torch.float32)
        torch.special.xlogy(-1, self.inclusion, out=log_weights)  # -log π
        log_weights = log_weights.expand(-(-num_items // num_tails), -1, -1)
        return log_weights.masked_fill(in_turns(unused, num_tails), -torch.inf).flatten(0, 1)[:num_items]


def of_items(tails: Tensor, first_item: int, num_items: int) -> Tensor:
    """The tail of each of some consecutive items: ``[n, K_t]`` for ``[G, K_t]``."""
    if len(tails) == 1:
        return tails.expand(num_items, -1)
    first = first_item % len(tails)
    in_turn = tails.roll(-first, 0) if first else tails
    return in_turn.repeat(-(-num_items // len(tails)), 1)[:num_items]


def in_turns(items: Tensor, num_tails: int) -> Tensor:
    """The items in turns of one item per tail: ``[n, G, ...]`` for ``[N, ...]``, with zeros in the last turn."""
    missing = -len(items) % num_tails
    if missing:
        items = torch.cat([items, items.new_zeros(missing, *items.shape[1:])])
    return items.unflatten(0, (len(items) // num_tails, num_tails))


def by_tail(items: Tensor, num_tails: int) -> Tensor:
    """The items of each tail: ``[G, n, ...]`` for ``[N, ...]``, with zeros where a tail has an item fewer."""
    return in_turns(items, num_tails).transpose(0, 1)


def at_tails(values: Tensor, tail_ids: Tensor, first_item: int = 0) -> Tensor:
    """Selects the columns of each item's tail: ``[n, K_t]`` for ``[n, C]``.

    Args:
        values: of consecutive items.
        tail_ids: of each tail, ``[G, K_t]``.
        first_item: the number of the first of these items.
    """
    if first_item % len(tail_ids) or len(values) % len(tail_ids):
        return values.gather(1, of_items(tail_ids, first_item, len(values)))
    values = in_turns(values, len(tail_ids))  # each tail once: the ids are not copied
    return values.gather(2, tail_ids.expand(len(values), -1, -1)).flatten(0, 1)


def by_item(tails: Tensor, num_items: int) -> Tensor:
    """The inverse of :func:`by_tail`: items in their order, ``[N, ...]`` for ``[G, n, ...]``."""
    return tails.transpose(0, 1).flatten(0, 1)[:num_items]


def sample_tails(density: ClassDensity, num_sampled: int, num_tails: int, generator: torch.Generator) -> Tails:
    """Samples the tails that the items of a step share, each ``num_sampled`` distinct classes by capped PPS.

    The tails are evenly spaced systematic samples of one random start. Together they hold as many different classes as
    they can, and their errors balance where a gradient is summed over items.

    Args:
        density: over classes.
        num_sampled: K_t; if C is at most K_t, the result is one tail of all classes.
        num_tails: G.
        generator: a CPU generator.
    """
    values, total = density
    num_classes, dtype = len(values), widest(values.device)
    if num_sampled >= num_classes:
        return every_class(num_classes, values.device)
    values = values.to(dtype)
    total = values.sum() if total is None else total
    start = torch.rand(1, dtype=torch.float64, generator=generator)
    if uses_triton(values.device):
        from hf_dis.sampling.triton_tails import tail_ids, tail_scale

        scale = tail_scale(values.topk(num_sampled).values, total, num_classes)
        cumulative = torch.minimum(values, scale[1]).cumsum(0)
        return Tails(*tail_ids(cumulative, values, scale, float(start), num_sampled, num_tails))
    starts = below_one((start + torch.arange(num_tails, dtype=torch.float64) / num_tails) % 1, num_sampled)
    # One copy brings the numbers 1..K_t, and the points of each tail.
    numbers = torch.arange(1, num_sampled + 1, dtype=torch.float64)
    points = to_device(torch.cat([numbers[None], starts[:, None] - 1 + numbers]), values.device)
    numbers, points = points.split([1, num_tails])
    most = share_of_certain(total, largest_densities(values, num_sampled), numbers, num_classes)
    # In units of the density: the classes' shares end to end, and the points on them.
    shares = values.clamp_max(most)
    # Rounding may leave the sum below a point: such a point is the last class's.
    ids = torch.searchsorted(shares[:-1].cumsum(0), points * most, right=True)
    return Tails(ids, shares.take(ids).div_(most))


def largest_densities(values: Tensor, number: int) -> Tensor:
    """Finds the largest densities, falling, ``[number]``: as ``topk``, which is slow on a CPU where there are many.

    The K largest lie in the K groups with the largest maxima. The 512 largest of 4 million take a sixth of the time.

    Args:
        values: ``[C]``.
        number: at most C.
    """
    groups = len(values) // GROUP
    if values.device.type == "cpu" and groups >= 2 * number:
        grouped, left_over = values.tensor_split([groups * GROUP])
        grouped = grouped.view(GROUP, groups)  # maxima are taken between contiguous stretches of memory
        best = grouped.amax(0).topk(number, sorted=False).indices
        values = torch.cat([grouped.index_select(1, best).flatten(), left_over])
    return values.topk(number).values


def every_class(num_classes: int, device: torch.device) -> Tails:
    """One tail of all classes."""
    ids = torch.arange(num_classes, device=device)[None]
    return Tails(ids, torch.ones_like(ids, dtype=widest(device)))


def no_class(device: torch.device | str) -> Tails:
    """One tail of no class."""
    none = torch.empty(1, 0, dtype=torch.long, device=device)
    return Tails(none, none.to(widest(none.device)))


def share_of_certain(total: Tensor, largest: Tensor, numbers: Tensor, num_classes: int) -> Tensor:
    """Finds the density from which on a class is certain to be in a tail: 1 / κ.

    At most K_t classes can be capped, and they are the largest. All other classes are one entry.

    Args:
        total: of the density, a scalar.
        largest: the K_t largest densities, falling, ``[K_t]``.
        numbers: 1..K_t, of the same type.
        num_classes: C, more than K_t.
    """
    sums = largest.flip(0).cumsum(0)
    others = (total - sums[-1]).clamp_min((num_classes - len(largest)) * torch.finfo(largest.dtype).tiny)
    # 1 / κ of capping_scale: where all but j of the largest are capped, j classes share the sum of uncapped ones.
    return ((sums + others) / numbers).amin()


def is_outside(ids: Tensor, tail_ids: Tensor) -> Tensor:
    """Marks the classes of its tail that an item does not hold among its own.

    Args:
        ids: classes of each item, ``[N, m]``.
        tail_ids: of each tail, ascending, ``[G, K_t]``.

    Returns:
        bool, ``[N, K_t]``.
    """
    num_tails, num_shared = tail_ids.shape
    num_turns = -(-len(ids) // num_tails)
    outside = torch.ones(num_turns * num_tails, num_shared + 1, dtype=torch.bool, device=ids.device)
    if num_shared:
        items = by_tail(ids, num_tails)
        flat = items.flatten(1).contiguous()
        column = torch.searchsorted(tail_ids, flat).clamp_(max=num_shared - 1)
        column.masked_fill_(tail_ids.gather(1, column) != flat, num_shared)  # held by no tail
        by_tail(outside, num_tails).scatter_(2, column.view(items.shape), False)
    return outside[: len(ids), :num_shared]
