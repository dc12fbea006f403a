"""From models and arguments to a Distiller: task, vocabulary, teacher, sampler, head, exact or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_dis.arguments import DISArguments
from hf_dis.autotune import ITEMS, TOKENS, HeadCosts, measure_costs
from hf_dis.cache.attach import cached_teacher, check_cache, open_cache
from hf_dis.cache.reader import TeacherCache
from hf_dis.distiller import Distiller
from hf_dis.distributed.processes import of_first_process, process_index
from hf_dis.distributed.replicas import Replicas
from hf_dis.head.check import check_row_sparse_head, check_sharded_head
from hf_dis.head.sharded import sharded_heads
from hf_dis.head.tensor_parallel import check_tensor_parallel, is_tensor_parallel
from hf_dis.loss.f_divergence import divergence_of
from hf_dis.models.head_search import find_head_layers, find_heads
from hf_dis.models.spread import is_fully_sharded
from hf_dis.models.tasks import Task, find_task, num_outputs
from hf_dis.models.ties import check_tied_rows, find_tied_embeddings
from hf_dis.models.vocabulary import shared_classes
from hf_dis.sampler_spec import SamplerSpec
from hf_dis.sampling.budget import make_budget
from hf_dis.sampling.cached_sampler import make_cached_sampler
from hf_dis.sampling.sampler import ClassSampler, make_sampler
from hf_dis.sharded_teacher import ShardedTeacher, is_spread, tensor_parallel_classes
from hf_dis.teacher.cached import CachedTeacher
from hf_dis.teacher.loading import check_separate, placed
from hf_dis.teacher.online import OnlineTeacher
from hf_dis.teacher.stream import LogitStream

logger = logging.get_logger(__name__)

Context = Callable[[], AbstractContextManager]


def build_distiller(
    student: nn.Module,
    teacher: nn.Module | None = None,
    arguments: DISArguments | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_cache: TeacherCache | str | Path | None = None,
    eval_teacher_cache: TeacherCache | str | Path | None = None,
    device: torch.device | None = None,
    seed: int = 0,
    context: Context = nullcontext,
    precision: torch.dtype | None = None,
    label_names: Sequence[str] = ("labels",),
    is_sharded: bool | Literal["fsdp2"] = False,
    num_items: int | None = None,
    steps_rows: bool = False,
) -> Distiller:
    """Makes a :class:`hf_dis.Distiller` from models and arguments; run it on every process, once these are joined.

    Args:
        student: the model that is trained, not wrapped.
        teacher: a model that returns ``.logits``; it is put on ``device``, frozen and never trained.
        arguments: the settings of the method; later changes of the object have no effect.
        tokenizer, teacher_tokenizer: of the models, where their vocabularies have different widths.
        teacher_cache, eval_teacher_cache: stored targets of the training and the evaluation data, or their folders.
        device: of the training; None: that of the student.
        seed: of the sampler; the index of the process is added, or that of its copy of a tensor-parallel student.
        context: entered around the teacher's forwards; ``accelerator.autocast`` for mixed precision.
        precision: the narrowest type that the student computes in, if narrower than its logits.
        label_names: columns of a batch that the student is not given.
        is_sharded: the trainer will shard the student's parameters by FSDP or DeepSpeed; ``"fsdp2"``: by FSDP2.
        num_items: of a batch, for the choice of ``head_mode="auto"``; None: 128 examples, or 2,048 tokens.
        steps_rows: the optimizer is a :class:`hf_dis.RowSparseAdamW`; decides where ``row_sparse_head`` is None.

    Raises:
        ValueError, TypeError: if models, caches and arguments do not fit; names value, expectation and remedy.
    """
    arguments, device = (arguments or DISArguments()).settings(), device or next(student.parameters()).device
    task = find_task(student)
    width, is_sharded = num_outputs(student, task), "fsdp2" if is_fully_sharded(student) else is_sharded
    caches = [open_cache(cache) for cache in (teacher_cache, eval_teacher_cache)]
    num_classes = _count_classes(student, teacher, caches, task, width, arguments, tokenizer, teacher_tokenizer)
    why_dense = _why_dense(student, width, arguments, is_sharded, steps_rows)
    given = arguments, task, num_classes, caches[0], seed, device, (student, teacher)
    spec, sampler = _make_sampler(*given, row_sparse=why_dense is None)
    given = student, width, num_classes, num_items, arguments, spec, caches[0], device, context
    mode, costs = _choose_mode(*given, row_sparse=why_dense is None)
    head = _head(student, teacher, width, arguments, mode, is_sharded, why_dense)
    parts = {"task": task, "num_classes": num_classes, "sampler": sampler, "mode": mode, "costs": costs}
    return Distiller(
        student,
        arguments,
        **parts,
        **head,
        **_teachers(student, teacher, caches, num_classes, arguments, sampler, device, context),
        student_stream=_student_stream(student, width, head["head_layers"], is_sharded, context),
        label_names=label_names,
        precision=precision,
    )


def _head(
    student: nn.Module,
    teacher: nn.Module | None,
    width: int,
    arguments: DISArguments,
    mode: str,
    is_sharded: bool | Literal["fsdp2"],
    why_dense: str | None,
) -> dict[str, Any]:
    """Keywords of a Distiller: the layers of the head, and its gradients; checks that models on processes fit."""
    layers = _find_head(student, width, arguments, mode)
    check_sharded_head(student, teacher, layers, is_sharded)
    check_tensor_parallel(student, teacher, layers, arguments, mode)
    check_tied_rows(student)
    return {"head_layers": layers, **_row_sparse(student, layers, arguments, mode, is_sharded, why_dense)}


def _count_classes(
    student: nn.Module,
    teacher: nn.Module | None,
    caches: Sequence[TeacherCache | None],
    task: Task,
    width: int,
    arguments: DISArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> int:
    """C, the classes that the student shares with its teacher and every cache."""
    if teacher is None and caches[0] is None:
        raise ValueError("there is no teacher: pass a teacher, or teacher_cache")
    if teacher is None and arguments.probe_steps:
        raise ValueError(
            f"probe_steps is {arguments.probe_steps}, but a teacher_cache lacks most classes: set probe_steps "
            "to 0, or pass teacher_model too"
        )
    if caches != [None, None] and divergence_of(arguments).needs_all_teacher_probs:
        raise ValueError(
            f"divergence is {arguments.divergence!r}, and a cache of teacher targets was given. This divergence needs "
            "the teacher's probability of every class that is computed, and a cache holds only some. Pass a "
            "teacher in place of teacher_cache and eval_teacher_cache, or set divergence='forward_kl'"
        )
    counts = [
        check_cache(cache, student, width, task.is_lm, arguments.temperature, tokenizer)
        for cache in caches
        if cache is not None
    ]
    if teacher is not None:
        counts.append(shared_classes(student, teacher, tokenizer, teacher_tokenizer))
    if any(count != counts[0] for count in counts):
        raise ValueError(f"teacher and caches have different numbers of classes: {counts}; use those of one teacher")
    return counts[0]


def _teachers(
    student: nn.Module,
    teacher: nn.Module | None,
    caches: Sequence[TeacherCache | None],
    num_classes: int,
    arguments: DISArguments,
    sampler: ClassSampler,
    device: torch.device,
    context: Context,
) -> dict[str, OnlineTeacher | CachedTeacher | None]:
    """The teachers of a Distiller, by its arguments: of training, the one that is a model, and of evaluation."""
    online = None
    if teacher is not None:
        check_separate(student, teacher)
        teacher, temperature = placed(teacher, device), arguments.temperature
        may_mask = not divergence_of(arguments).needs_full_support
        given = teacher, num_classes, temperature, sampler.rank_depth
        if is_spread(teacher):
            same = is_tensor_parallel(teacher)
            online = ShardedTeacher(*given, has_same_items=same, context=context, may_mask=may_mask)
        else:
            online = OnlineTeacher(*given, context=context, may_mask=may_mask)
    stored, evaluation = (None if cache is None else cached_teacher(cache) for cache in caches)
    return {"teacher": stored or online, "online_teacher": online, "eval_teacher": evaluation}


def _make_sampler(
    arguments: DISArguments,
    task: Task,
    num_classes: int,
    cache: TeacherCache | None,
    seed: int,
    device: torch.device,
    models: tuple[nn.Module, nn.Module | None],
    row_sparse: bool,
) -> tuple[SamplerSpec, ClassSampler]:
    """The specification with the defaults of the task, and its sampler, for student and teacher."""
    student, teacher = models
    replicas = Replicas.of(student)
    seed += process_index() if replicas is None else replicas.index
    stored = None if cache is None else cache.header.layout
    spec = arguments.sampler_spec().resolved(
        vocab_size=num_classes if task.is_lm else None,
        row_sparse=row_sparse,
        stored_sample_size=None if stored is None else stored.sample_size,
    )
    head = next(iter(sharded_heads(student).values()), None)
    shard = None if head is None else head.shard
    if stored is None and teacher is not None and shard is None:
        shard = tensor_parallel_classes(teacher, num_classes)
    given = {"seed": seed, "device": device, "shard": shard}
    if stored is None:
        sampler = make_sampler(num_classes, spec, **given)
    else:
        sampler = make_cached_sampler(stored, spec, **given)
    if arguments.gradient_error is not None:
        sampler.budget = make_budget(arguments, sampler)
    return spec, sampler


def _why_dense(
    student: nn.Module, width: int, arguments: DISArguments, is_sharded: bool | Literal["fsdp2"], steps_rows: bool
) -> str | None:
    """The reason for a dense gradient of a head that is sampled, or None: the gradient is row-sparse."""
    if arguments.row_sparse_head is not None:
        return None if arguments.row_sparse_head else "row_sparse_head is False"
    cause = None
    if not steps_rows:
        cause = "the optimizer may not step sparse gradients"
    elif is_tensor_parallel(student) or (is_sharded and not sharded_heads(student)):
        cause = "the student is spread over processes: only row_sparse_head=True makes it row-sparse"
    else:
        try:
            check_row_sparse_head(student, find_head_layers(student, width, arguments.head_name), is_sharded)
        except ValueError as error:
            cause = str(error)
    if cause is not None and arguments.num_updated_classes is not None:
        raise ValueError(
            f"num_updated_classes is {arguments.num_updated_classes}, and the gradient of the head is dense, since "
            f"{cause}: leave num_updated_classes out"
        )
    return cause


def _row_sparse(
    student: nn.Module,
    layers: Sequence[str],
    arguments: DISArguments,
    mode: str,
    is_sharded: bool | Literal["fsdp2"],
    why_dense: str | None,
) -> dict[str, Any]:
    """Keywords of a Distiller: the choice of row-sparse gradients, and the embeddings that get them too."""
    if mode == "exact":
        if arguments.row_sparse_head:
            logger.warning("row_sparse_head has no effect: all classes are computed, and the head trains densely")
        return {}
    if why_dense is not None:
        logger.info(f"the gradient of the head is dense: {why_dense}")
        return {}
    if arguments.row_sparse_head:  # else it was checked as it was chosen
        check_row_sparse_head(student, layers, is_sharded)
    return {"row_sparse": True, "tied_embeddings": find_tied_embeddings(student, layers)}


def _choose_mode(
    student: nn.Module,
    width: int,
    num_classes: int,
    num_items: int | None,
    arguments: DISArguments,
    spec: SamplerSpec,
    cache: TeacherCache | None,
    device: torch.device,
    context: Context,
    row_sparse: bool,
) -> tuple[str, HeadCosts | None]:
    """The mode, and the costs where they were timed."""
    num_sampled = spec.num_sampled_classes
    if num_sampled >= num_classes:
        if num_sampled > num_classes or arguments.head_mode == "sampled":
            logger.warning(
                f"num_sampled_classes is {num_sampled} and there are {num_classes} classes: all of them are computed, "
                "which is exact distillation"
            )
        return "exact", None
    if arguments.head_mode != "auto":
        return arguments.head_mode, None
    try:
        layers = find_head_layers(student, width, arguments.head_name)
    except ValueError as error:
        if arguments.head_name is not None:
            raise
        logger.warning(f"head_mode='auto' chose 'exact': {error}")
        return "exact", None
    if sharded_heads(student) or is_tensor_parallel(student):
        logger.warning("head_mode='auto' chose 'sampled' without timing: the head is sharded")
        return "sampled", None
    num_features = student.get_submodule(layers[0]).in_features
    costs = of_first_process(
        lambda: measure_costs(
            num_classes,
            num_features,
            spec,
            num_items=num_items or (TOKENS if find_task(student).has_token_items else ITEMS),
            stored=None if cache is None else cache.header.layout,
            row_sparse=row_sparse,
            device=device,
            context=context,
        )
    )
    mode = "sampled" if costs.sampling_pays else "exact"
    logger.info(f"head_mode='auto' chose {mode!r} for {num_classes:,} classes: {costs}")
    return mode, costs


def _student_stream(
    student: nn.Module, width: int, layers: Sequence[str], is_sharded: bool | Literal["fsdp2"], context: Context
) -> LogitStream | None:
    """Computes the student's logits in chunks; None where its head has several layers, or a process has a part."""
    if len(layers) != 1 or is_sharded or sharded_heads(student):
        return None
    return LogitStream(student, width, context=context)


def _find_head(student: nn.Module, width: int, arguments: DISArguments, mode: str) -> tuple[str, ...]:
    """The layers to switch; in exact mode the head as it is, or none where it cannot be found."""
    if mode == "sampled":
        layers = find_head_layers(student, width, arguments.head_name)
        if arguments.probe_steps and sharded_heads(student):
            raise ValueError(
                f"probe_steps is {arguments.probe_steps}, but the output head is sharded: the probe takes the exact "
                "gradient of a whole head; set probe_steps to 0"
            )
        if arguments.probe_steps and len(layers) > 1:
            raise ValueError(
                f"probe_steps is {arguments.probe_steps}, but the output head is made of {' and '.join(layers)}: the "
                "probe takes the exact gradient of one layer; set probe_steps to 0"
            )
        return layers
    try:
        return find_heads(student, width, arguments.head_name)
    except ValueError:
        if arguments.head_name is not None or arguments.head_learning_rate is not None:
            raise
        return ()
