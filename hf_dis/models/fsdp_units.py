"""Parameters that FSDP2 leaves sharded for a step, while it gathers the other parameters of their unit.

torch gathers a unit as a whole, and has no public call to leave a parameter out for a while. This module changes the
lists of parameters that a unit gathers and reduces, and nothing else of FSDP2.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class KeptSharded:
    """Keeps parameters sharded until :meth:`release`, in forward and in backward.

    FSDP2 has to be set up, which a first forward of the model does.

    Args:
        model: that FSDP2 sharded, with no unit gathered.
        parameters: of it, as they are while they are sharded.

    Attributes:
        found: the number of the parameters that FSDP2 would gather.
        dtype: in which FSDP2 would gather the parameters; None: in their own.
    """

    def __init__(self, model: nn.Module, parameters: Collection[nn.Parameter]):
        self.found = 0
        self.dtype: torch.dtype | None = None
        self._units: list[tuple[FSDPModule, list[Any], list[tuple[Any, list[Any]]]]] = []
        wanted, seen = {id(parameter) for parameter in parameters}, set()
        for module in model.modules():
            if not isinstance(module, FSDPModule) or (state := module._get_fsdp_state()) in seen:
                continue
            seen.add(state)
            if state._is_root is None:  # a parameter that is left out now would never be set up
                continue
            groups = state._fsdp_param_groups
            before = [(group, group.fsdp_params) for group in groups]
            own = [one for _, params in before for one in params if id(one.sharded_param) in wanted]
            if own:
                self.found, self.dtype = self.found + len(own), own[0].param_dtype
                self._units.append((module, groups, before))
                for group, params in before:
                    group.fsdp_params = [one for one in params if id(one.sharded_param) not in wanted]
                # FSDP2 cannot gather a group of nothing.
                state._fsdp_param_groups = [group for group in groups if group.fsdp_params]

    def release(self) -> None:
        """Gives the parameters back to their units."""
        for module, groups, before in self._units:
            module.reshard()  # the state of a group is that of all its parameters
            module._get_fsdp_state()._fsdp_param_groups = groups
            for group, params in before:
                group.fsdp_params = params
        self._units = []
