"""RowSparseAdamW: AdamW whose work on an output head is that of the rows that were sampled, whatever the head's size."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from hf_dis.head.row_gradients import coalesced

# Elements of the rows [n, d] that are stepped at a time on CPU: a chunk and its moments stay in the cache.
CHUNK_ELEMENTS = 2**17


class RowSparseAdamW(torch.optim.AdamW):
    """AdamW for all parameters of a model: torch's own, and lazily by row where a gradient is sparse.

    A parameter with a dense gradient is stepped by ``torch.optim.AdamW``. Where the gradient is a sparse COO tensor
    with one sparse dimension, as ``row_sparse_head=True`` makes it for the head's weight and bias, only the rows in it
    are read and written: their moments, their own step counts (for the bias correction) and their weights, which
    first get the decay of all steps of the parameter since they were last in a gradient, Π (1 - lr_t λ_t), under any
    schedule. All other rows stay as they are. docs/optimizer.md says how this differs from dense AdamW.

    Args:
        params, lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``; lr is a number.
        foreach, fused: torch's implementation of the dense steps.

    Raises:
        ValueError: if lr · weight_decay is 1 or more for a sparse gradient: that decay would turn weights around.
        RuntimeError: if a parameter's gradient is sparse in one step and dense in another, or sparse in more than its
            rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
        # A GradScaler leaves it to torch's fused kernel to unscale, and to skip a step that overflowed; the steps by
        # row know nothing of that, so the scaler has to do it itself.
        self._step_supports_amp_scaling = False

    def _init_group(self, group: dict[str, Any], params_with_grad: list[Tensor], *lists: list[Tensor]) -> bool:
        """Where torch's ``step`` collects the parameters of a group: it gets the dense ones, the others step here."""
        dense = []
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_item = parameter.grad.is_sparse
                state = self.state[parameter]
                if state and by_item != (state["step"].dim() == 1):
                    raise RuntimeError(
                        f"the gradient of a parameter of shape {tuple(parameter.shape)} is "
                        f"{'sparse' if by_item else 'dense'} in this step and was not before: its moments are kept by "
                        "row or as a whole, so sample classes in every step or in none, or make a new optimizer"
                    )
                if by_item:
                    self._step_rows(parameter, group)
                    continue
            dense.append(parameter)
        return super()._init_group({**group, "params": dense}, params_with_grad, *lists)

    def _step_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter.grad.sparse_dim() != 1:
            raise RuntimeError(
                f"a gradient of shape {tuple(parameter.shape)} is sparse in {parameter.grad.sparse_dim()} dimensions: "
                "RowSparseAdamW needs it sparse in the first alone, rows as a whole"
            )
        gradient = coalesced(parameter.grad)
        decay = group["lr"] * group["weight_decay"]
        if decay >= 1:
            raise ValueError(
                f"lr is {group['lr']} and weight_decay {group['weight_decay']}: their product has to be below 1, "
                "the share of a weight that a step takes away"
            )
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(len(parameter), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            # Σ log(1 - lr λ) over the parameter's steps: up to now, and up to when each row was last touched.
            state["log_decay"] = 0.0
            state["row_log_decay"] = torch.zeros(len(parameter), dtype=torch.float64, device=parameter.device)
        state["log_decay"] += math.log1p(-decay)
        ids, rows = gradient._indices()[0], gradient._values()
        on_cpu = rows.device.type == "cpu"
        chunk_rows = max(1, CHUNK_ELEMENTS // max(1, rows[:1].numel())) if on_cpu else max(1, len(ids))
        columns = (1,) * (rows.dim() - 1)
        factors = [factor.to(rows.dtype).view(-1, *columns) for factor in _row_factors(state, group, ids)]
        for parts in zip(*(tensor.split(chunk_rows) for tensor in (ids, rows, *factors)), strict=True):
            _step_chunk(parameter, state, group, *parts)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in torch; the decay that rows have had stays in float64, whatever the parameter's type."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            saved = state_dict["state"].get(number, {})
            if "row_log_decay" in saved:
                self.state[parameter]["row_log_decay"] = saved["row_log_decay"].to(parameter.device)


def _row_factors(state: dict[str, Any], group: dict[str, Any], ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts a step of each row, and its decay as done.

    Returns:
        for each row, in float64: what the decay that it missed leaves of it, what the root of the second moment is to
        be multiplied by for both bias corrections, and what is to be added to that then.
    """
    steps = state["step"].index_select(0, ids) + 1
    kept = (state["log_decay"] - state["row_log_decay"].index_select(0, ids)).exp()
    state["step"].index_copy_(0, ids, steps)
    state["row_log_decay"].index_fill_(0, ids, state["log_decay"])
    bias1, bias2 = (_bias_correction(beta, steps.double()) for beta in group["betas"])
    return kept, bias1 / bias2.sqrt(), group["eps"] * bias1


def _bias_correction(beta: float, steps: Tensor) -> Tensor:
    """1 - β^t"""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)


def _step_chunk(
    parameter: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    ids: Tensor,
    rows: Tensor,
    kept: Tensor,
    scale: Tensor,
    eps: Tensor,
) -> None:
    beta1, beta2 = group["betas"]
    mean = state["exp_avg"].index_select(0, ids).lerp_(rows, 1 - beta1)
    state["exp_avg"].index_copy_(0, ids, mean)
    square = state["exp_avg_sq"].index_select(0, ids).mul_(beta2).addcmul_(rows, rows, value=1 - beta2)
    state["exp_avg_sq"].index_copy_(0, ids, square)
    # m / bias1 / (sqrt(v / bias2) + eps), as one division.
    denominator = square.sqrt_().mul_(scale).add_(eps)
    weights = parameter.index_select(0, ids).mul_(kept).addcdiv_(mean, denominator, value=-group["lr"])
    parameter.index_copy_(0, ids, weights)
