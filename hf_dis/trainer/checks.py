"""Checks of arguments: what was given, what it has to be, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from hf_dis.distributed.processes import num_processes
from hf_dis.head.optimizer import RowSparseAdamW

if TYPE_CHECKING:
    from hf_dis.trainer.mixin import DISTrainerMixin

ROW_SPARSE_OPTIMS = ("adamw_torch", "adamw_torch_fused")


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
        raise ValueError("use_liger_kernel replaces the head that DIS switches to sampled classes: set it to False")
    if args.row_sparse_head and args.head_mode == "exact":
        raise ValueError(
            "row_sparse_head is set and head_mode is 'exact', which touches every row: set one of them back"
        )
    optimizer = (kwargs.get("optimizers") or (None, None))[0]
    if args.head_learning_rate is not None and optimizer is not None:
        raise ValueError(
            "head_learning_rate is set, but so is an optimizer of your own: give the head a parameter group there"
        )


def check_process_count(trainer: DISTrainerMixin) -> None:
    """Checks that every process trains one copy of the student on examples of its own.

    Raises:
        ValueError: if one process would use several GPUs, or accelerate counts other processes than DeepSpeed runs: of
            DeepSpeed's processes on a machine without an accelerator it takes each for the only one.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process would use nn.DataParallel, which copies the student past the "
            "switched head: start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    counted = trainer.accelerator.num_processes
    if trainer.is_deepspeed_enabled and num_processes() != counted:
        raise ValueError(
            f"DeepSpeed runs {num_processes()} processes and accelerate counts {counted}, as it does without an "
            "accelerator: each would train on all data. Run it where there are accelerators, or leave deepspeed out "
            "and set use_cpu=True, for plain data parallelism"
        )


def check_optimizer(trainer: DISTrainerMixin, kwargs: dict[str, Any]) -> None:
    """Checks that the optimizer can step a row-sparse head.

    Args:
        trainer: whose engine is made.
        kwargs: what it passes on to its host.

    Raises:
        ValueError: if the optimizer is not RowSparseAdamW; names the remedy.
    """
    if not trainer.distiller.row_sparse:
        return
    args = trainer.args
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
