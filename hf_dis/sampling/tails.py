"""Shared tails: classes that are sampled once per step for many items, and how items find them.

A step has G tails of K_t classes, and item i uses tail ``i mod G``. The shared tails are this project's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_dis.kernels import uses_triton
from hf_dis.precision import widest
from hf_dis.sampling.designs import below_one, capping_scale, to_device, unit_steps


class Tails(NamedTuple):
    """The tails of a step: item i uses tail ``i mod G``.

    Attributes:
        ids: class ids, distinct and ascending in each tail, ``[G, K_t]``.
        inclusion: π of these classes, in the widest type of the device, ``[G, K_t]``.
    """

    ids: Tensor
    inclusion: Tensor

    def of_items(self, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
        """Class ids, log ω and certain (bool) of each item: ``[N, K_t]`` each."""
        parts = self.ids, -self.inclusion.log().float(), self.inclusion >= 1
        return tuple(of_items(part, 0, num_items) for part in parts)


def of_items(tails: Tensor, first_item: int, num_items: int) -> Tensor:
    """The tail of each of some consecutive items: ``[n, K_t]`` for ``[G, K_t]``."""
    if len(tails) == 1:
        return tails.expand(num_items, -1)
    first = first_item % len(tails)
    in_turn = tails.roll(-first, 0) if first else tails
    return in_turn.repeat(-(-num_items // len(tails)), 1)[:num_items]


def by_tail(items: Tensor, num_tails: int) -> Tensor:
    """The items of each tail: ``[G, n, ...]`` for ``[N, ...]``, with zeros where a tail has an item fewer."""
    missing = -len(items) % num_tails
    if missing:
        items = torch.cat([items, items.new_zeros(missing, *items.shape[1:])])
    return items.unflatten(0, (len(items) // num_tails, num_tails)).transpose(0, 1)


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
        ids = torch.arange(num_classes, device=density.device)[None]
        return Tails(ids, torch.ones_like(ids, dtype=dtype))
    density = density.to(dtype)
    start = torch.rand(1, dtype=torch.float64, generator=generator)
    starts = below_one((start + torch.arange(num_tails, dtype=torch.float64) / num_tails) % 1, num_sampled)
    if uses_triton(density.device):
        from hf_dis.sampling.triton_tails import tail_ids, tail_scale

        scale = tail_scale(density.topk(num_sampled).values, density.sum(), num_classes)
        cumulative = torch.minimum(density, scale[1]).cumsum(0)
        return Tails(*tail_ids(cumulative, density, scale, to_device(starts, density.device), num_sampled))
    # At most K_t classes can be capped, and they are the largest. All other classes are one entry of their mean size.
    largest = density.topk(num_sampled).values
    num_others = num_classes - num_sampled
    others = ((density.sum() - largest.sum()) / num_others).clamp_min(torch.finfo(dtype).tiny)
    scale = capping_scale(torch.cat([largest, others[None]]), num_sampled, num_others)
    # In units of the density: the classes' shares end to end, and the points on them.
    points = unit_steps(starts[:, None], num_sampled, density.device) / scale
    ids = torch.searchsorted(density.clamp_max(1 / scale).cumsum(0), points, right=True).clamp(max=num_classes - 1)
    return Tails(ids, (scale * density.take(ids)).clamp_(max=1))


def is_member(ids: Tensor, tail_ids: Tensor) -> Tensor:
    """Marks the classes of its tail that an item holds among its own.

    Args:
        ids: classes of each item, ``[N, m]``.
        tail_ids: of each tail, ascending, ``[G, K_t]``.

    Returns:
        bool, ``[N, K_t]``.
    """
    num_tails, num_shared = tail_ids.shape
    items = by_tail(ids, num_tails)
    held = torch.zeros(*items.shape[:2], num_shared + 1, dtype=torch.bool, device=ids.device)
    if num_shared:
        flat = items.flatten(1).contiguous()
        column = torch.searchsorted(tail_ids, flat).clamp(max=num_shared - 1)
        column = torch.where(tail_ids.gather(1, column) == flat, column, num_shared)
        held.scatter_(2, column.view(items.shape), True)
    return by_item(held, len(ids))[:, :num_shared]
