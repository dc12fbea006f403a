"""The classes that teacher and student share: equal labels, or the common part of two vocabularies."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_dis.models.tasks import base_model, find_task, num_outputs


def shared_classes(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Counts the classes ``0..C-1`` that mean the same to student and teacher; all other classes are not distilled.

    Classifiers need the same number of classes. Vocabularies may be padded to different sizes (151,936 and 152,064
    entries, for example), or have tokens added at the end of one, if the tokenizers confirm that.

    Args:
        student, teacher: the models. A teacher outside transformers is taken to have the student's classes.
        tokenizer, teacher_tokenizer: of the models, if known.

    Returns:
        C.

    Raises:
        ValueError: if tasks, numbers of classes or tokens differ; names the difference.
    """
    task = find_task(student)
    width = num_outputs(student, task)
    if not hasattr(base_model(teacher), "config"):
        return width
    teacher_task = find_task(teacher)
    if teacher_task is not task:
        raise ValueError(
            f"the teacher, a {type(teacher).__name__}, is a {teacher_task.value}, the student, a "
            f"{type(student).__name__}, a {task.value}: both have to be of one kind; load the teacher for the task of "
            "the student"
        )
    teacher_width = num_outputs(teacher, task)
    if not task.is_lm:
        if teacher_width != width:
            raise ValueError(
                f"the teacher has {teacher_width} classes, the student {width}: both need the same classes in the "
                "same order; set num_labels of the student, or use a teacher trained on these labels"
            )
        return width
    if tokenizer is not None and teacher_tokenizer is not None:
        return min(width, teacher_width, common_tokens(tokenizer, teacher_tokenizer))
    if teacher_width != width:
        raise ValueError(
            f"the teacher's vocabulary has {teacher_width} entries, the student's {width}: the first "
            f"{min(width, teacher_width)} have to be the same tokens, which only the tokenizers show. Pass the "
            "student's tokenizer as processing_class and the teacher's as teacher_processing_class"
        )
    return width


def common_tokens(tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> float:
    """Counts the ids, from 0 on, that mean the same token to both tokenizers; infinite if both know the same ids.

    Args:
        tokenizer, teacher_tokenizer: of student and teacher.

    Raises:
        ValueError: if an id means different tokens, or an id that only one tokenizer knows is not at the end.
    """
    ours, theirs = ({index: token for token, index in t.get_vocab().items()} for t in (tokenizer, teacher_tokenizer))
    remedy = "distillation needs one tokenizer: use a teacher and a student of the same family"
    common = ours.keys() & theirs.keys()
    differing = sorted(index for index in common if ours[index] != theirs[index])
    if differing:
        examples = ", ".join(f"{index} is {ours[index]!r} and {theirs[index]!r}" for index in differing[:3])
        raise ValueError(
            f"student and teacher have different tokenizers: of {len(common)} ids {len(differing)} mean different "
            f"tokens (id {examples}); {remedy}"
        )
    one_sided = ours.keys() ^ theirs.keys()
    if not one_sided:
        return float("inf")
    first = min(one_sided)
    if first < max(common, default=-1):
        token, side = (ours[first], "student's") if first in ours else (theirs[first], "teacher's")
        raise ValueError(
            f"student and teacher have different tokenizers: id {first} is {token!r} in the {side} alone, and tokens "
            f"of both follow; {remedy}"
        )
    return first
