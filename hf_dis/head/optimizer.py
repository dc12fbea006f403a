"""RowSparseAdamW: AdamW whose work on an output head grows with the sampled rows, not with the size of the head."""

from __future__ import annotations

import logging
import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT, StateDict

from hf_dis.checks import require
from hf_dis.head.moments import (
    MOMENT_DTYPES,
    MOMENTS,
    RowMoments,
    are_rounded,
    lie_in_host_memory,
    type_of_moments,
    type_of_step,
)
from hf_dis.head.row_gradients import coalesced
from hf_dis.head.spread_rows import is_row_sparse, local, spread_as
from hf_dis.kernels import tell_once, uses_triton
from hf_dis.precision import widest

# Elements of the rows [n, d] that are stepped at a time on CPU: a chunk and its moments stay in the cache.
CHUNK_ELEMENTS = 2**17

# The same on an accelerator, where few launches matter: 256 MiB in float32 for each of the two copies of a chunk.
# At most 2 chunks, so that launches do not grow with the rows: two copies are then as large as the gradient.
ACCELERATOR_CHUNK_ELEMENTS, ACCELERATOR_CHUNKS = 2**26, 2

# In the state of a parameter: sums of each row up to its last step, and the same sums up to now.
ROW_SUMS = {"row_log_decay": "log_decay", "row_path": "path"}


class RowSparseAdamW(torch.optim.AdamW):
    """Steps all parameters of a model by AdamW: as torch does, or lazily by row where a gradient is sparse.

    A parameter with a dense gradient is stepped by ``torch.optim.AdamW``. ``row_sparse_head=True`` makes the gradients
    of the head's weight and bias sparse COO tensors with one sparse dimension. Of such a parameter only the rows in
    the gradient are read and written:

    - each row has its own moments, and its own step count for the bias correction;
    - a row first gets the decay of all steps since it was last in a gradient, Π (1 - lr_t λ_t), under any schedule;
    - with ``catch_up`` the learning rate of its step is the sum of those of all these steps, Σ lr_t, times ``gain``.
      The product is cut to 1/d for rows of d weights, or lr where lr is larger, so that a step changes a logit by at
      most about 1;
    - all other rows stay as they are.

    docs/optimizer.md compares the optimizer with dense AdamW, and derives both rules. They are this project's.

    Args:
        params: as for ``torch.optim.AdamW``.
        lr: as for ``torch.optim.AdamW``, but a number.
        betas: as for ``torch.optim.AdamW``.
        eps: as for ``torch.optim.AdamW``.
        weight_decay: as for ``torch.optim.AdamW``.
        catch_up: let rows make up for the steps that they missed; False: a row moves by lr in each of its own steps.
        gain: 1 or more; makes up for the noise of the sample in the second moment, see :func:`gain_of`. No effect
            without ``catch_up``.
        offload_moments: keep the moments of a row-sparse weight in host memory, where the weight is on an accelerator.
            Only the rows of a step travel. No effect on a processor, whose memory holds the moments anyway.
        moment_dtype: of the moments of a row-sparse weight: ``torch.float32``, or ``torch.bfloat16``, which is rounded
            at random without bias. None: the type of the weight, as torch has it.
        foreach: choice of torch's implementation of the dense steps.
        fused: choice of torch's implementation of the dense steps.

    Raises:
        ValueError: if ``gain`` or ``moment_dtype`` has a different value. In a step: if lr · weight_decay is 1 or more
            for a sparse gradient, which would change the sign of weights.
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
        catch_up: bool = True,
        gain: float = 1.0,
        offload_moments: bool = False,
        moment_dtype: torch.dtype | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        require(1 <= gain < math.inf, "gain", gain, "1 or more, and finite")
        wanted = f"one of {', '.join(map(str, MOMENT_DTYPES))}"
        require(moment_dtype in MOMENT_DTYPES, "moment_dtype", moment_dtype, wanted)
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
        self.defaults |= {"catch_up": catch_up, "gain": gain}
        # Place and type of moments are of the run and not of its state: both may differ in a resumed run.
        self.defaults |= {"offload_moments": offload_moments, "moment_dtype": moment_dtype}
        for group in self.param_groups:
            group.setdefault("catch_up", catch_up)
            group.setdefault("gain", gain)
        # A GradScaler lets torch's fused kernel unscale gradients and skip a step that overflowed. The steps by row do
        # neither, so the scaler has to do both itself.
        self._step_supports_amp_scaling = False

    def _init_group(self, group: dict[str, Any], params_with_grad: list[Tensor], *lists: list[Tensor]) -> bool:
        """Gives the parameters with dense gradients to torch's ``step``, and steps the row-sparse ones here."""
        dense = []
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_row = is_row_sparse(parameter.grad)
                state = self.state[parameter]
                if state and by_row != (state["step"].dim() == 1):
                    raise RuntimeError(
                        f"the gradient of a parameter of shape {tuple(parameter.shape)} is "
                        f"{'sparse' if by_row else 'dense'} in this step and was not before. Moments are kept by row "
                        "or as a whole: sample classes in every step or in none, or make a new optimizer"
                    )
                if by_row:
                    self._step_rows(parameter, group)
                    continue
            dense.append(parameter)
        return super()._init_group({**group, "params": dense}, params_with_grad, *lists)

    def _step_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, rows = local(parameter.grad), local(parameter)
        if gradient.sparse_dim() != 1:
            raise RuntimeError(
                f"a gradient of shape {tuple(parameter.shape)} is sparse in {gradient.sparse_dim()} dimensions: "
                "RowSparseAdamW needs whole rows, sparse in the first dimension alone; make the gradient so, or dense"
            )
        gradient = coalesced(gradient)
        decay = group["lr"] * group["weight_decay"]
        if decay >= 1:
            raise ValueError(
                f"lr is {group['lr']} and weight_decay {group['weight_decay']}: their product has to be below 1, "
                "the share of a weight that a step takes away; lower one of them"
            )
        travel = lie_in_host_memory(parameter, self.defaults["offload_moments"])
        if travel and isinstance(parameter, DTensor):
            raise ValueError(
                f"offload_moments is set, and a parameter of shape {tuple(parameter.shape)} is a DTensor, whose "
                "moments have to be on its device: leave offload_moments out"
            )
        state = self.state[parameter]
        if not state:
            state |= {name: spread_as(parameter, values) for name, values in self._state_of_rows(rows).items()}
            # Σ log(1 - lr λ) and Σ gain lr over the parameter's steps up to now; ROW_SUMS are up to a row's last step.
            state["log_decay"] = state["path"] = 0.0
        state["log_decay"] += math.log1p(-decay)
        state["path"] += group["gain"] * group["lr"]
        how = travel, type_of_step(parameter, self.defaults["moment_dtype"])
        own = {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
        _step_touched(rows, own, group, gradient._indices()[0], gradient._values(), *how)

    def _state_of_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """The state of rows before their first step."""
        state = {"step": torch.zeros(len(rows), device=rows.device)}
        state |= {name: torch.zeros_like(rows, **self._moments_of(rows)) for name in MOMENTS}
        zeros = {"dtype": widest(rows.device), "device": rows.device}
        return state | {name: torch.zeros(len(rows), **zeros) for name in ROW_SUMS}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads a state as torch does; the sums of rows stay in the device's widest type.

        torch casts a state to the type of the parameter, and brings it to the device of the parameter.

        Raises:
            ValueError: if the state is of an earlier version, without the sums of learning rates.
        """
        by_row, others = {}, {}
        for number, saved in state_dict["state"].items():
            (by_row if "row_log_decay" in saved else others)[number] = saved
        if any("row_path" not in saved for saved in by_row.values()):
            raise ValueError(
                "the optimizer's state is of an earlier version, and lacks the sums of learning rates: load the "
                "checkpoint as the student of a new run"
            )
        super().load_state_dict({**state_dict, "state": others})
        for group in self.param_groups:
            group.setdefault("gain", 1.0)  # of a state of an earlier version
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in by_row:
                self.state[parameter] = self._placed(by_row[number], parameter)

    def _placed(self, saved: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """The saved state of a row-sparse parameter, where a step reads it."""
        device = parameter.device
        state = {**saved, "step": saved["step"].to(device)}
        for name in MOMENTS:
            state[name] = saved[name].to(**self._moments_of(parameter))
        for name in ROW_SUMS:
            state[name] = saved[name].to(device, widest(device))
        return state

    def _moments_of(self, parameter: Tensor) -> dict[str, Any]:
        """The device and the type of the moments of a row-sparse parameter."""
        is_host = lie_in_host_memory(parameter, self.defaults["offload_moments"])
        dtype = type_of_moments(parameter, self.defaults["moment_dtype"])
        return {"device": torch.device("cpu") if is_host else parameter.device, "dtype": dtype}


def _step_touched(
    parameter: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    ids: Tensor,
    rows: Tensor,
    travel: bool,
    dtype: torch.dtype,
) -> None:
    """Steps the rows ``ids`` by their gradient ``rows``, computed in a type, and counts the step."""
    width = math.prod(rows.shape[1:])
    longest, device = longest_step(group, width), parameter.device
    if uses_triton(device) and parameter.is_contiguous():
        if not travel and not are_rounded(state["exp_avg"].dtype, dtype):
            from hf_dis.head import triton_adamw

            triton_adamw.adamw(parameter, state, group, ids, rows, longest)
            return
        tell_once(logging.INFO, "optimizer: torch steps rows with moments in host memory, or rounded at random")
    elements = CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    if device.type != "cpu" and not travel:  # travelling rows are not to fill the device
        elements = max(elements, -(-rows.numel() // ACCELERATOR_CHUNKS))
    chunk_rows = max(1, elements // max(1, width))
    factors = _row_factors(state, group, ids, longest, dtype)
    factors = [factor.view(-1, *(1,) * (rows.dim() - 1)) for factor in factors]
    places = ids.cpu() if travel else ids
    for parts in zip(*(tensor.split(chunk_rows) for tensor in (ids, places, rows, *factors)), strict=True):
        moments = RowMoments(state, *parts[:2], travel, dtype)
        _step_chunk(parameter, moments, group, parts[0], parts[2].to(dtype), *parts[3:])


def gain_of(sampled_share: float) -> float:
    """Finds the gain of the rows of a head whose classes are sampled with shared tails.

    The noise of the sample makes the second moment larger, and each step of a row smaller. A quarter more brings
    students to the quality of exact distillation at the same learning rates (``benchmarks/parity.py``).

    Args:
        sampled_share: the share of all classes that an item samples, in (0, 1]. With all of them there is no noise.
    """
    return 1 + (1 - sampled_share) / 4


def longest_step(group: dict[str, Any], width: int) -> float:
    """Finds the largest learning rate of a row that missed steps, for rows of ``width`` weights.

    Adam moves each weight of a row by up to the learning rate. So the step changes a logit by up to d times that for
    features of size 1, as behind a layer norm, and by the learning rate for a bias.
    """
    return max(group["lr"], 1 / width) if group["catch_up"] else group["lr"]


def _row_factors(
    state: dict[str, Any], group: dict[str, Any], ids: Tensor, longest: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Counts a step of each row, marks its sums as done, and computes the factors of the step.

    Args:
        state, group: of the parameter in the optimizer.
        ids: the rows, ``[n]``.
        longest: of :func:`longest_step`.
        dtype: of the factors.

    Returns:
        values per row in a type, computed in the device's widest type. The first is the learning rate. The next two
        are negative: the factor of the root of the second moment (both bias corrections), and the term to add to that
        product. If any step has decayed weights, the last is the share of the weight that the missed decay leaves.
    """
    steps = state["step"].index_select(0, ids).add_(1)
    state["step"].index_copy_(0, ids, steps)
    # β^t - 1 for both β.
    logs = [math.log(beta) if beta else -math.inf for beta in group["betas"]]
    bias1, bias2 = torch._foreach_expm1(torch._foreach_mul([steps.to(widest(ids.device))] * 2, logs))
    decays = bool(state["log_decay"])
    rates, scale, eps, *kept = torch.empty(3 + decays, len(ids), dtype=dtype, device=ids.device).unbind()
    # Each result is rounded as it is written.
    rates.copy_(_missed(state, "row_path", ids).clamp_(group["lr"], longest))
    torch.mul(bias1, bias2.neg_().rsqrt_(), out=scale)
    torch.mul(bias1, group["eps"], out=eps)
    if decays:
        torch.exp(_missed(state, "row_log_decay", ids), out=kept[0])
    return rates, scale, eps, *kept


def _missed(state: dict[str, Any], of_row: str, ids: Tensor) -> Tensor:
    """Sums over the steps that each row has missed, ``[n]``, and marks the rows as done.

    Args:
        state: of the parameter in the optimizer.
        of_row: the sum, a key of :data:`ROW_SUMS`.
        ids: the rows, ``[n]``.
    """
    now = state[ROW_SUMS[of_row]]
    missed = now - state[of_row].index_select(0, ids)
    state[of_row].index_fill_(0, ids, now)
    return missed


def _step_chunk(
    parameter: Tensor,
    moments: RowMoments,
    group: dict[str, Any],
    ids: Tensor,
    rows: Tensor,
    rates: Tensor,
    scale: Tensor,
    eps: Tensor,
    kept: Tensor | None = None,
) -> None:
    beta1, beta2 = group["betas"]
    mean = moments.mean.lerp_(rows, 1 - beta1)
    square = moments.square.mul_(beta2).addcmul_(rows, rows, value=1 - beta2)
    moments.write()
    # -m / bias1 / (sqrt(v / bias2) + eps), as one division.
    denominator = torch.addcmul(eps, square.sqrt_(), scale, out=square)
    weights = parameter.index_select(0, ids).to(rows.dtype)
    if kept is not None:
        weights.mul_(kept)
    weights.addcdiv_(mean.mul_(rates), denominator)
    parameter.index_copy_(0, ids, weights.to(parameter.dtype))
