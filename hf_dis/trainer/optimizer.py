"""The hooks of a distilling trainer around its optimizer: parameter groups, row-sparse and sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_dis.distributed.processes import kept_from_ddp
from hf_dis.distributed.sums import average_rows
from hf_dis.head.optimizer import RowSparseAdamW, gain_of
from hf_dis.head.row_gradients import clip_grad_norm_

if TYPE_CHECKING:
    from hf_dis.arguments import DISArguments
    from hf_dis.distiller import Distiller
    from hf_dis.head.switch import SampledHead


class OptimizerHooks:
    """Optimises what :class:`hf_dis.DISTrainerMixin` trains: heads with row-sparse gradients, and sharded heads."""

    distiller: Distiller
    head: SampledHead
    _sets_gain = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the host's; with ``head_learning_rate`` the head's parameters form groups of their own."""
        is_new, given = self.optimizer is None, self.optimizer_cls_and_kwargs
        if self.distiller.row_sparse and given is None:  # for this call: the next training may have other settings
            keywords = self.get_optimizer_cls_and_kwargs(self.args)[1]
            keywords |= keywords_of_moments(self.args)
            self.optimizer_cls_and_kwargs, self._sets_gain = (RowSparseAdamW, keywords), is_new
        try:
            optimizer = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given
        if is_new and self.args.head_learning_rate is not None:
            give_head_rate(optimizer, self.head.parameters(), self.args.head_learning_rate)
        return optimizer

    def _set_gain(self, is_exact: bool) -> None:
        """Sets the gain of the head's rows for a step, in an optimizer that the trainer made.

        Args:
            is_exact: the step computed all classes, so that its gradient has no noise of a sample.
        """
        if self._sets_gain:
            sampler = self.distiller.sampler
            share = min(1.0, sampler.columns / self.distiller.num_classes)
            gain = 1.0 if is_exact or not sampler.num_shared else gain_of(share)
            for group in self.optimizer.param_groups:
                group["gain"] = gain

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if not self.distiller.row_sparse and not self._is_head_sharded:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return self._clip(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float:
        """As the host's, which would leave out the rows of other processes where nothing is clipped."""
        if grad_norm is None and (self._is_head_sharded or (self.distiller.row_sparse and self.is_head_spread)):
            grad_norm = self._clip(model, inf)
        return super()._get_grad_norm(model, grad_norm)

    def _clip(self, model: nn.Module, max_norm: float) -> Tensor:
        shard = self.head.shard if self._is_head_sharded else None
        return clip_grad_norm_(model.parameters(), max_norm, shard, () if shard is None else self.head.parameters())

    @property
    def _is_head_sharded(self) -> bool:
        return self.head.shard is not None

    @property
    def is_head_spread(self) -> bool:
        """True if FSDP2 or a ``tp_plan`` spreads the head over processes, or will do so."""
        return self.is_fsdp_enabled or any(isinstance(one, DTensor) for one in self.head.parameters())

    def _start_state_of_rows(self) -> None:
        """Gives a new optimizer the state into which torch.distributed.checkpoint loads: by row for the head.

        torch makes the state by a step without learning rate on dense gradients of zero.
        """
        optimizer = self.optimizer.optimizer  # which accelerate has wrapped
        groups, rates = optimizer.param_groups, [group["lr"] for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        for parameter in self.head.parameters():
            parameter.grad = None
        average_rows(self.head.parameters())  # of no row
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def _rows_kept_from_ddp(self) -> AbstractContextManager[None]:
        """A context in which ``DistributedDataParallel`` leaves out the head, if the head's gradient is row-sparse.

        Of a sharded or a spread head each process keeps its own rows.
        """
        if self.distiller.row_sparse and not self._is_head_sharded and not self.is_head_spread:
            return kept_from_ddp(self.model, self.distiller.head_layers)
        return nullcontext()


def keywords_of_moments(arguments: DISArguments) -> dict[str, Any]:
    """Keywords of a :class:`hf_dis.RowSparseAdamW`: place and type of the moments of a row-sparse head.

    Args:
        arguments: the settings.
    """
    types = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    return {"offload_moments": arguments.offload_moments, "moment_dtype": types[arguments.moment_dtype]}


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
