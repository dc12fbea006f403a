"""Checks of what a trainer is made with; each error gives the value, the expectation and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_dis.distributed.processes import num_processes
from hf_dis.head.optimizer import RowSparseAdamW
from hf_dis.head.tensor_parallel import is_tensor_parallel
from hf_dis.trainer.optimizer import OptimizerHooks, keywords_of_moments

if TYPE_CHECKING:
    from hf_dis.trainer.mixin import DISTrainerMixin

ROW_SPARSE_OPTIMS = ("adamw_torch", "adamw_torch_fused")


def check_config(trainer_class: type[DISTrainerMixin], args: Any) -> None:
    """Checks the class of a configuration.

    Args:
        trainer_class: that is given the configuration.
        args: the configuration.

    Raises:
        TypeError: if it is not an instance of the trainer's ``config_class``.
    """
    if not isinstance(args, trainer_class.config_class):
        name, found, wanted = trainer_class.__name__, type(args).__name__, trainer_class.config_class.__name__
        raise TypeError(f"args is a {found}: {name} needs a {wanted}")


def check_trainer_arguments(args: Any, teacher_model: Any, teacher_cache: Any, kwargs: dict[str, Any]) -> None:
    """Checks what a trainer is given, before its host is set up.

    Args:
        args: the configuration of the trainer.
        teacher_model: the teacher, or its name.
        teacher_cache: the teacher's stored targets, or their folder.
        kwargs: what the trainer passes on to its host.

    Raises:
        ValueError: if something cannot be used; names the cause and the remedy.
        TypeError: if the teacher is neither a model nor a name.
    """
    _check_host_arguments(args)
    if teacher_model is None and teacher_cache is None:
        raise ValueError(
            "there is no teacher: pass teacher_model, a model or the name or path of a checkpoint, or teacher_cache"
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
    optimizer = (kwargs.get("optimizers") or (None, None))[0]
    if args.head_learning_rate is not None and optimizer is not None:
        raise ValueError(
            f"head_learning_rate is {args.head_learning_rate}, but you pass an optimizer, whose rates are its own: "
            "give the head a parameter group in the optimizer and leave head_learning_rate out"
        )


def _check_host_arguments(args: Any) -> None:
    """Checks the host's settings that exclude distillation by sampled classes."""
    for name in ("fsdp", "deepspeed"):
        if args.use_cpu and getattr(args, name):
            raise ValueError(
                f"{name} and use_cpu are both set, and with use_cpu accelerate runs plain data parallelism: unset one "
                "of them"
            )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}: smoothing needs every class; set it to 0, the "
            "teacher's probabilities already smooth the labels"
        )
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel replaces the head that DIS switches to sampled classes: set it to False")
    parallelism = args.parallelism_config
    if parallelism is not None:
        _check_whole_sequences(parallelism.cp_size, parallelism.sp_size)


def _check_whole_sequences(cp_size: int, sp_size: int) -> None:
    """Checks that every process has whole sequences."""
    for name, size, kind in (("cp_size", cp_size, "context"), ("sp_size", sp_size, "sequence")):
        if size > 1:
            raise ValueError(
                f"{name} is {size}: {kind} parallelism splits each sequence over processes, which is unsupported, as "
                f"classes are sampled for whole sequences. Set {name} to 1 and use data or tensor parallelism, or "
                "FSDP or DeepSpeed for a model that is too large for one device"
            )


def _check_tensor_parallelism(trainer: DISTrainerMixin) -> None:
    """Checks that a student was spread by transformers if the host counts on tensor parallelism."""
    size = trainer.get_tp_size()
    if size > 1 and not is_tensor_parallel(trainer.model):
        raise ValueError(
            f"tp_size is {size}: tensor parallelism needs a student that transformers has spread over the processes. "
            f"Load the student by from_pretrained with distributed_config=DistributedConfig(tp_size={size}), without "
            "DeepSpeed, or set tp_size to 1"
        )
    if size > 1 and trainer.accelerator.mixed_precision == "fp16":
        raise ValueError(
            "fp16 is set and the student is tensor-parallel: a step whose gradient overflows in some rows would "
            "be skipped by some processes alone; set bf16=True in place of fp16"
        )


def check_processes(trainer: DISTrainerMixin) -> None:
    """Checks that every process trains one copy of the student, or its part of one, on whole examples.

    Args:
        trainer: whose host is set up.

    Raises:
        ValueError: if one process would use several GPUs, or a sequence is split over processes. Or if a model is
            split by other means than a ``tp_plan``, or accelerate counts other processes than DeepSpeed or
            torch.distributed runs.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process would use nn.DataParallel, which copies the student past the "
            "switched head: start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    _check_whole_sequences(trainer.get_cp_size(), trainer.get_sp_size())
    _check_tensor_parallelism(trainer)
    counted = trainer.accelerator.num_processes
    if num_processes() != counted:
        runner = "DeepSpeed" if trainer.is_deepspeed_enabled else "torch.distributed"
        raise ValueError(
            f"{runner} runs {num_processes()} processes and accelerate counts {counted}, as accelerate does without "
            "an accelerator: each process would train on all data. Run it where there are accelerators, or leave "
            "deepspeed out and set use_cpu=True, for plain data parallelism"
        )


def check_sharded_student(trainer: DISTrainerMixin) -> None:
    """Checks that a student whose head is sharded can be trained and saved.

    A student whose head is whole passes.

    Args:
        trainer: whose engine is made.

    Raises:
        ValueError: if mixed precision is float16.
        TypeError: if the student is not a model of transformers.
    """
    if trainer.head.shard is None:
        return
    if not isinstance(trainer.model, PreTrainedModel):
        raise TypeError(
            f"the student is a {type(trainer.model).__name__} and its head is sharded: checkpoints of sharded heads "
            "need a PreTrainedModel of transformers; derive the student from it, or leave the head whole"
        )
    if trainer.accelerator.mixed_precision == "fp16":
        raise ValueError(
            "fp16 is set and the output head is sharded: a step whose gradient overflows in some rows would be "
            "skipped by some processes alone; set bf16=True in place of fp16"
        )


def steps_rows(trainer: DISTrainerMixin) -> bool:
    """Returns True if the optimizer of a trainer is, or will be, a RowSparseAdamW."""
    kind = _kind_of_optimizer(trainer)
    return trainer.args.optim in ROW_SPARSE_OPTIMS if kind is None else issubclass(kind, RowSparseAdamW)


def makes_row_optimizer(trainer: DISTrainerMixin) -> bool:
    """Returns True if :func:`steps_rows` holds, and no subclass makes or chooses an optimizer of its own."""
    kind = type(trainer)
    is_own = kind.create_optimizer is not OptimizerHooks.create_optimizer
    is_own |= kind.create_optimizer_and_scheduler is not Trainer.create_optimizer_and_scheduler
    if is_own or not steps_rows(trainer):
        return False
    # With these names the stock method chooses torch's AdamW, whose place RowSparseAdamW takes.
    has_one = _kind_of_optimizer(trainer) is not None
    return has_one or trainer.get_optimizer_cls_and_kwargs(trainer.args)[0] is torch.optim.AdamW


def check_optimizer(trainer: DISTrainerMixin) -> None:
    """Checks that the optimizer can step a row-sparse head, and does so as the settings say.

    Args:
        trainer: whose engine is made.

    Raises:
        ValueError: if the optimizer is not RowSparseAdamW, or is set differently; names the remedy.
    """
    _check_moments(trainer)
    if trainer.distiller.row_sparse and trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision == "fp16":
        raise ValueError(
            "fp16 and row_sparse_head are set, and FSDP shards the head: some processes alone would skip a step whose "
            "gradient overflows in their rows. Set bf16=True in place of fp16, or row_sparse_head=False"
        )
    if trainer.distiller.row_sparse and trainer.args.offload_moments and trainer.is_head_spread:
        raise ValueError(
            "offload_moments is set, and the head is spread over processes as a DTensor, whose moments have to be on "
            "its device: leave offload_moments out"
        )
    if not trainer.distiller.row_sparse or steps_rows(trainer):
        return
    kind, optim = _kind_of_optimizer(trainer), trainer.args.optim
    if kind is not None:
        raise ValueError(
            f"row_sparse_head is set, but the optimizer is {kind.__name__}, which cannot step sparse gradients as "
            "AdamW: use hf_dis.RowSparseAdamW, or set row_sparse_head=False"
        )
    raise ValueError(
        f"row_sparse_head is set, but optim is {optim.value!r}: it has to be one of "
        f"{', '.join(ROW_SPARSE_OPTIMS)}, of which RowSparseAdamW is the lazy form; or set row_sparse_head=False"
    )


def _check_moments(trainer: DISTrainerMixin) -> None:
    """Checks that settings of the moments of a row-sparse head reach the optimizer."""
    distiller, keywords = trainer.distiller, keywords_of_moments(trainer.args)
    if trainer.optimizer_cls_and_kwargs is not None:
        given = trainer.optimizer_cls_and_kwargs[1]
    else:
        given = keywords if trainer.optimizer is None else trainer.optimizer.defaults
    for name in trainer.args.moment_settings():
        if not distiller.row_sparse:
            cause = "all classes are computed" if distiller.mode == "exact" else "the gradient of the head is dense"
            raise ValueError(
                f"{name} is set, and {cause}, so that a step reads the moments of every row: set "
                f"head_mode='sampled' and row_sparse_head=True, or leave {name} out"
            )
        if given.get(name) != keywords[name]:
            raise ValueError(
                f"{name} is set, and the optimizer was given without it: give RowSparseAdamW the argument "
                f"{name}={keywords[name]}, or leave the optimizer to the trainer"
            )


def _kind_of_optimizer(trainer: DISTrainerMixin) -> type | None:
    """The class of the optimizer that a trainer has, or was given to make; None where the host makes one by name."""
    optimizer = trainer.optimizer
    if isinstance(optimizer, AcceleratedOptimizer):  # of an earlier training, which the host continues
        optimizer = optimizer.optimizer
    return type(optimizer) if optimizer is not None else (trainer.optimizer_cls_and_kwargs or (None,))[0]
