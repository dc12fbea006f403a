"""Parameter groups of a distilling trainer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def give_head_rate(optimizer: torch.optim.Optimizer, head: Iterable[nn.Parameter], rate: float) -> None:
    """Moves the head's parameters to groups of their own, with another learning rate.

    Args:
        optimizer: of all parameters.
        head: the parameters of the output head.
        rate: the learning rate of the head, 0 or more.
    """
    of_head = {id(parameter) for parameter in head}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in of_head]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_head]
            optimizer.add_param_group({**group, "params": moved, "lr": rate})
