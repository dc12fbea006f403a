"""Checks of arguments: what was given, what it has to be, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from .optim import RowSparseAdamW

PROPOSALS = ("dis", "teacher", "uniform", "topk")
SAMPLERS = ("pps", "replacement")
ROW_SPARSE_OPTIMS = ("adamw_torch", "adamw_torch_fused")


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises ValueError unless the condition holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}: it has to be {expected}")


def require_number(name: str, value: object, kind: type[int] | type[float]) -> None:
    """Raises TypeError unless the value is a whole number (kind ``int``), or any number (kind ``float``)."""
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number:
        expected = "a whole number" if kind is int else "a number"
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}: it has to be {expected}")


def check_sampling_arguments(
    *,
    num_sampled_classes: int,
    num_shared_classes: int,
    num_tails: int,
    num_updated_classes: int | None,
    rank_depth: int | None,
    proposal: str,
    sampler: str,
    proposal_floor: float,
    proposal_decay: float,
) -> None:
    """Checks the arguments that :func:`hf_dis.make_sampler` and :class:`hf_dis.DISConfig` share.

    Raises:
        ValueError, TypeError: names the first that is out of its range, its value, and what it may be.
    """
    require_number("num_sampled_classes", num_sampled_classes, int)
    require_number("num_shared_classes", num_shared_classes, int)
    require_number("num_tails", num_tails, int)
    for name, value in (("num_updated_classes", num_updated_classes), ("rank_depth", rank_depth)):
        if value is not None:
            require_number(name, value, int)
    for name, value in (("proposal_floor", proposal_floor), ("proposal_decay", proposal_decay)):
        require_number(name, value, float)
    require(num_sampled_classes >= 1, "num_sampled_classes", num_sampled_classes, "1 or more")
    require(num_shared_classes >= 0, "num_shared_classes", num_shared_classes, "0 or more")
    require(num_tails >= 1, "num_tails", num_tails, "1 or more")
    require(
        num_tails == 1 or num_shared_classes > 0,
        "num_tails",
        num_tails,
        "1 where no classes are shared; set num_shared_classes to the size of a tail",
    )
    require(
        num_updated_classes is None or num_updated_classes >= 1,
        "num_updated_classes",
        num_updated_classes,
        "1 or more, or None for all that are drawn",
    )
    require(rank_depth is None or rank_depth >= 1, "rank_depth", rank_depth, "1 or more, or None for 2 K")
    require(proposal in PROPOSALS, "proposal", proposal, f"one of {', '.join(PROPOSALS)}")
    require(sampler in SAMPLERS, "sampler", sampler, f"one of {', '.join(SAMPLERS)}")
    require(0 < proposal_floor <= 1, "proposal_floor", proposal_floor, "in (0, 1]; 0.05 is usual")
    require(0 <= proposal_decay < 1, "proposal_decay", proposal_decay, "in [0, 1); 0.95 is usual")
    require(
        sampler == "pps" or num_shared_classes == 0 or proposal == "topk",
        "sampler",
        sampler,
        "'pps' when classes are shared by rows; set num_shared_classes=0 to draw with replacement",
    )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Checks that class ids are within 0..C-1; on an accelerator this waits for the device.

    Raises:
        ValueError: names the ids that are not, or that they are no whole numbers.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: they have to be class ids, whole numbers 0..{num_classes - 1}")
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(
            f"labels {labels[outside].unique().tolist()[:10]} are outside 0..{num_classes - 1}: teacher and student "
            f"share {num_classes} classes; check num_labels, or the tokenizer, and the label column"
        )


def check_trainer_arguments(args: Any, teacher_model: Any, teacher_cache: Any, kwargs: dict[str, Any]) -> None:
    """Checks what a :class:`hf_dis.DISDistillationTrainer` is made with.

    Args:
        args: its DISConfig.
        teacher_model: the teacher, or its name.
        teacher_cache: its stored targets, or their folder.
        kwargs: what it passes on to ``Trainer``.

    Raises:
        ValueError: says what cannot be used, why, and what to do instead.
    """
    if teacher_model is None and teacher_cache is None:
        raise ValueError(
            "there is no teacher: pass teacher_model, a model or the name or path of a checkpoint, or teacher_cache"
        )
    if teacher_model is None and args.probe_steps:
        raise ValueError(
            f"probe_steps is {args.probe_steps}, but a teacher_cache does not know every class: set it to 0, or pass "
            "teacher_model too"
        )
    if teacher_model is not None and not isinstance(teacher_model, (nn.Module, str)):
        raise TypeError(
            f"teacher_model is a {type(teacher_model).__name__}: it has to be a model (a torch.nn.Module), or the "
            "name or path of a checkpoint as a string"
        )
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func runs after the student's forward, too late to choose the classes: override "
            "compute_loss in a subclass and call super().compute_loss"
        )
    for name in ("fsdp", "deepspeed"):
        if args.use_cpu and getattr(args, name):
            raise ValueError(
                f"{name} is set, and so is use_cpu, with which accelerate runs plain data parallelism instead: unset "
                "one of them"
            )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}: smoothing needs every class; set it to 0, the "
            "teacher's probabilities already smooth the labels"
        )
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel replaces the head that DIS switches to drawn classes: set it to False")
    optimizer = (kwargs.get("optimizers") or (None, None))[0]
    if args.head_learning_rate is not None and optimizer is not None:
        raise ValueError(
            "head_learning_rate is set, but so is an optimizer of your own: give the head a parameter group there"
        )


def check_row_sparse(
    args: Any,
    kwargs: dict[str, Any],
    model: nn.Module,
    head_parameters: Sequence[nn.Parameter],
    head_mode: str,
    is_sharded: bool,
) -> bool:
    """Whether the head's gradients are to be row-sparse, after checking that they can be.

    Args:
        args: a DISConfig.
        kwargs: what the trainer passes on to ``Trainer``.
        model: the student.
        head_parameters: those of its output head.
        head_mode: as chosen, ``"sampled"`` or ``"exact"``.
        is_sharded: by FSDP or DeepSpeed.

    Raises:
        ValueError: says what row_sparse_head cannot be combined with, and what to do instead.
    """
    if not args.row_sparse_head:
        return False
    if args.head_mode == "exact":
        raise ValueError(
            "row_sparse_head is set and head_mode is 'exact', which touches every row: set one of them back"
        )
    if torch.__version__ < (2, 14):
        raise ValueError(
            f"row_sparse_head is set, but torch is {torch.__version__}, which has no norm of sparse gradients: it "
            "needs torch 2.14 or newer; or set row_sparse_head=False"
        )
    if is_sharded:
        raise ValueError(
            "row_sparse_head is set, but FSDP and DeepSpeed shard dense gradients only: set it to False, or use plain "
            "data parallelism"
        )
    for parameter in head_parameters:
        tied = [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
        if len(tied) == 1 or not parameter.requires_grad:
            continue
        raise ValueError(
            f"row_sparse_head is set, but the head's weight is tied ({', '.join(tied)}) and gets dense gradients from "
            "its other use: set row_sparse_head=False, or untie it"
        )
    given = (kwargs.get("optimizers") or (None, None))[0]
    kind = type(given) if given is not None else (kwargs.get("optimizer_cls_and_kwargs") or (None,))[0]
    if kind is not None and not issubclass(kind, RowSparseAdamW):
        raise ValueError(
            f"row_sparse_head is set, but the optimizer is {kind.__name__}, which cannot step sparse gradients as "
            "AdamW: use hf_dis.RowSparseAdamW, or set row_sparse_head=False"
        )
    if kind is None and args.optim not in ROW_SPARSE_OPTIMS:
        raise ValueError(
            f"row_sparse_head is set, but optim is {args.optim.value!r}: it has to be one of "
            f"{', '.join(ROW_SPARSE_OPTIMS)}, of which RowSparseAdamW is the lazy form; or set row_sparse_head=False"
        )
    return head_mode == "sampled"
