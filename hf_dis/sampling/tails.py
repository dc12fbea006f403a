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


class Tails(NamedTuple):
    """The tails of a step: item i uses tail ``i mod G``.

    Attributes:
        ids: class ids, distinct and ascending in each tail, ``[G, K_t]``.
        inclusion: π of these classes, in the widest type of the device, ``[G, K_t]``.
    """

    ids: Tensor
    inclusion: Tensor

    def columns(self, outside: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Makes the columns of each item, ``[N, K_t]`` each.

        Args:
            outside: true for classes that the item has in no other column, ``[N, K_t]``.
            labels: class ids ``[N]``, which have a column of their own; None: there is none.

        Returns:
            log ω, -inf where another column holds the class; and true where π is 1.
        """
        num_items, num_tails = len(outside), len(self.ids)
        if labels is None:
            unused = ~outside
        else:
            is_label = self.ids == in_turns(labels, num_tails)[:, :, None]
            unused = outside <= is_label.flatten(0, 1)[:num_items]  # not outside, or the label
        log_weights = torch.empty_like(self.inclusion, dtype=torch.float32)
        torch.log(self.inclusion, out=log_weights)
        log_weights = log_weights.neg_().expand(-(-num_items // num_tails), -1, -1)
        log_weights = log_weights.masked_fill(in_turns(unused, num_tails), -torch.inf).flatten(0, 1)[:num_items]
        return log_weights, of_items(self.inclusion >= 1, 0, num_items)


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


def sample_tails(density: Tensor, num_sampled: int, num_tails: int, generator: torch.Generator) -> Tails:
    """Samples the tails that the items of a step share, each ``num_sampled`` distinct classes by capped PPS.

    The tails are evenly spaced systematic samples of one random start. Together they hold as many different classes as
    they can, and their errors balance where a gradient is summed over items.

    Args:
        density: over classes, positive, ``[C]``.
        num_sampled: K_t; if C is at most K_t, the result is one tail of all classes.
        num_tails: G.
        generator: a CPU generator.
    """
    num_classes, dtype = len(density), widest(density.device)
    if num_sampled >= num_classes:
        return every_class(num_classes, density.device)
    density = density.to(dtype)
    start = torch.rand(1, dtype=torch.float64, generator=generator)
    if uses_triton(density.device):
        from hf_dis.sampling.triton_tails import tail_ids, tail_scale

        scale = tail_scale(density.topk(num_sampled).values, density.sum(), num_classes)
        cumulative = torch.minimum(density, scale[1]).cumsum(0)
        return Tails(*tail_ids(cumulative, density, scale, float(start), num_sampled, num_tails))
    starts = below_one((start + torch.arange(num_tails, dtype=torch.float64) / num_tails) % 1, num_sampled)
    most = share_of_certain(density.sum(), density.topk(num_sampled).values, num_classes)
    numbers = torch.arange(1, num_sampled + 1, device=density.device)
    # In units of the density: the classes' shares end to end, and the points on them.
    shares = density.clamp_max(most)
    points = (to_device(starts[:, None] - 1, density.device) + numbers).mul_(most)
    ids = torch.searchsorted(shares.cumsum(0), points, right=True).clamp_(max=num_classes - 1)
    return Tails(ids, shares.take(ids).div_(most))


def every_class(num_classes: int, device: torch.device) -> Tails:
    """One tail of all classes."""
    ids = torch.arange(num_classes, device=device)[None]
    return Tails(ids, torch.ones_like(ids, dtype=widest(device)))


def share_of_certain(total: Tensor, largest: Tensor, num_classes: int) -> Tensor:
    """Finds the density from which on a class is certain to be in a tail: 1 / κ.

    At most K_t classes can be capped, and they are the largest. All other classes are one entry.

    Args:
        total: of the density, a scalar.
        largest: the K_t largest densities, falling, ``[K_t]``.
        num_classes: C, more than K_t.
    """
    tiny = torch.finfo(largest.dtype).tiny
    others = (total - largest.sum()).clamp_min((num_classes - len(largest)) * tiny)
    # 1 / κ of capping_scale: where all but j of the largest are capped, j classes share the sum of uncapped ones.
    numbers = torch.arange(1, len(largest) + 1, device=largest.device)
    return (torch.cat([others[None], largest.flip(0)]).cumsum(0)[1:] / numbers).amin()


def is_outside(ids: Tensor, tail_ids: Tensor) -> Tensor:
    """Marks the classes of its tail that an item does not hold among its own.

    Args:
        ids: classes of each item, ``[N, m]``.
        tail_ids: of each tail, ascending, ``[G, K_t]``.

    Returns:
        bool, ``[N, K_t]``.
    """
    num_tails, num_shared = tail_ids.shape
    outside = torch.ones(len(ids), num_shared + 1, dtype=torch.bool, device=ids.device)
    if num_shared:
        items = by_tail(ids, num_tails)
        flat = items.flatten(1).contiguous()
        column = torch.searchsorted(tail_ids, flat).clamp_(max=num_shared - 1)
        column.masked_fill_(tail_ids.gather(1, column) != flat, num_shared)  # held by no tail
        outside.scatter_(1, by_item(column.view(items.shape), len(ids)), False)
    return outside[:, :num_shared]
