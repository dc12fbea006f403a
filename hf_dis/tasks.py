"""What a model answers: one class an example, or one a token; and which classes teacher and student share."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto as auto

from .rows import Rows, token_rows


class Task(Enum):
    """A kind of model, after the transformers classes that it is made of."""

    CLASSIFICATION = "classification"
    TOKEN_CLASSIFICATION = "token classification"
    MASKED_LM = "masked language model"
    CAUSAL_LM = "causal language model"
    SEQ2SEQ_LM = "sequence-to-sequence language model"

    @property
    def is_lm(self) -> bool:
        """Whether the classes are a vocabulary."""
        return self in (Task.MASKED_LM, Task.CAUSAL_LM, Task.SEQ2SEQ_LM)

    @property
    def has_token_rows(self) -> bool:
        """Whether labels are ``[B, S]``, one class a token, rather than ``[B]``."""
        return self is not Task.CLASSIFICATION


def _names(*mappings: dict[str, str | tuple[str, ...]]) -> frozenset[str]:
    """Names of classes, of which a type of model may have one or several."""
    named = [names for mapping in mappings for names in mapping.values()]
    return frozenset(name for names in named for name in (names if isinstance(names, (tuple, list)) else (names,)))


# In this order: transformers lists Bart and T5 as masked language models too.
CLASSES = {
    Task.SEQ2SEQ_LM: _names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    Task.CAUSAL_LM: _names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    Task.MASKED_LM: _names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    Task.TOKEN_CLASSIFICATION: _names(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    Task.CLASSIFICATION: _names(
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    ),
}


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, taken out of PEFT's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_task(model: nn.Module) -> Task:
    """The task of a model, by its class or the first of its base classes that transformers knows.

    A class that is not from transformers is a classifier if its config has ``num_labels`` and it has no output
    embeddings.

    Raises:
        ValueError: if it is none of these tasks.
    """
    model = base_model(model)
    for kind in type(model).__mro__:
        for task, names in CLASSES.items():
            if kind.__name__ in names:
                return task
    is_own = not type(model).__module__.startswith("transformers.")
    if is_own and hasattr(getattr(model, "config", None), "num_labels") and not _output_embeddings(model):
        return Task.CLASSIFICATION
    raise ValueError(
        f"the task of {type(model).__name__} is not known: it has to be a transformers model, or derive from one, for "
        f"one of {', '.join(task.value for task in Task)}, or have a config with num_labels; or use DISLoss in a loop "
        "of your own"
    )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def find_rows(task: Task, inputs: dict[str, Tensor], labels: Tensor | None) -> Rows:
    """What is distilled of a batch.

    Args:
        task: of the model.
        inputs: of the model.
        labels: ``[B]``, or ``[B, S]`` where a task's rows are tokens; or None.

    Raises:
        ValueError: if the labels are of another shape.
    """
    if not task.has_token_rows:
        if labels is not None and labels.dim() != 1:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: a {task.value} model has one class id an example, [B]"
            )
        return Rows(len(next(iter(inputs.values())) if labels is None else labels), labels)
    side = "decoder_" if task is Task.SEQ2SEQ_LM else ""
    tokens = inputs.get(f"{side}input_ids", inputs.get(f"{side}inputs_embeds", labels))
    mask = inputs.get(f"{side}attention_mask")
    return token_rows(labels, mask, tokens.shape[:2], shifts_labels=task is Task.CAUSAL_LM)


def split_labels(
    model: nn.Module, task: Task, batch: dict[str, Tensor], label_names: Sequence[str] = ("labels",)
) -> tuple[Rows, dict[str, Tensor]]:
    """The rows of a batch, and its inputs without labels: so that the model computes no loss itself."""
    labels = batch.get("labels")
    inputs = {name: value for name, value in batch.items() if name not in label_names}
    if task is Task.SEQ2SEQ_LM and labels is not None and "decoder_input_ids" not in inputs:
        # The model would make them from its labels.
        inputs["decoder_input_ids"] = base_model(model).prepare_decoder_input_ids_from_labels(labels=labels)
    return find_rows(task, inputs, labels), inputs


def num_outputs(model: nn.Module, task: Task) -> int:
    """How many classes a model's output layer answers for: those of its vocabulary, padding included, or its labels.

    Raises:
        ValueError: if it is no single-label classifier of two or more classes.
    """
    model = base_model(model)
    if task.is_lm:
        embeddings = _output_embeddings(model)
        if isinstance(embeddings, nn.Embedding):
            return embeddings.num_embeddings
        return getattr(embeddings, "out_features", model.config.get_text_config().vocab_size)
    config = model.config
    if config.problem_type in ("regression", "multi_label_classification") or config.num_labels == 1:
        raise ValueError(
            f"the student's problem_type is {config.problem_type!r} with num_labels={config.num_labels}: distillation "
            "by sampled classes needs single-label classification with two classes or more"
        )
    return config.num_labels


def shared_classes(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """C, the classes ``0..C-1`` that mean the same to student and teacher; the others are not distilled.

    Classifiers need the same number. Vocabularies may be padded differently (151,936 rows and 152,064, say) or have
    tokens added at the end of one, if the tokenizers say so.

    Args:
        student, teacher: the models; a teacher that is no transformers model is taken to answer for the same classes.
        tokenizer, teacher_tokenizer: theirs, if known.

    Raises:
        ValueError: if tasks, numbers of classes or tokens differ; says in what.
    """
    task = find_task(student)
    width = num_outputs(student, task)
    if not hasattr(base_model(teacher), "config"):
        return width
    teacher_task = find_task(teacher)
    if teacher_task is not task:
        raise ValueError(
            f"the teacher, a {type(teacher).__name__}, is a {teacher_task.value}, the student, a "
            f"{type(student).__name__}, a {task.value}: both have to be of one kind"
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
            f"the teacher's vocabulary has {teacher_width} rows, the student's {width}, and whether the first "
            f"{min(width, teacher_width)} are the same tokens cannot be told: pass the student's tokenizer as "
            "processing_class and the teacher's as teacher_processing_class"
        )
    return width


def common_tokens(tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> float:
    """How many ids, from 0 on, mean the same token to both tokenizers; infinite if both know the same ids.

    Raises:
        ValueError: if an id that both know means different tokens, or tokens that only one knows are not at the end.
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
            f"student and teacher have different tokenizers: id {first} is {token!r} in the {side} alone, with tokens "
            f"of both after it; {remedy}"
        )
    return first
