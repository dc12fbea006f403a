"""Tasks of models: the kind of a model, the items of its batches, and the number of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from hf_dis.items import Items, token_items


class Task(Enum):
    """The kinds of models, each with its mapping of classes in transformers."""

    CLASSIFICATION = "classification"
    TOKEN_CLASSIFICATION = "token classification"
    MASKED_LM = "masked language model"
    CAUSAL_LM = "causal language model"
    SEQ2SEQ_LM = "sequence-to-sequence language model"

    @property
    def is_lm(self) -> bool:
        """True if the classes are a vocabulary."""
        return self in (Task.MASKED_LM, Task.CAUSAL_LM, Task.SEQ2SEQ_LM)

    @property
    def has_token_items(self) -> bool:
        """True if labels are ``[B, S]``, one class per token; false if they are ``[B]``."""
        return self is not Task.CLASSIFICATION


def _names(*mappings: dict[str, str | tuple[str, ...]]) -> frozenset[str]:
    """Collects the names of classes; a type of model has one name, or several in a tuple."""
    named = [names for mapping in mappings for names in mapping.values()]
    return frozenset(name for names in named for name in (names if isinstance(names, (tuple, list)) else (names,)))


# The order matters: transformers lists Bart and T5 as masked language models too.
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
    """Returns the transformers model inside PEFT's wrapper, or the model itself if it has no wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_task(model: nn.Module) -> Task:
    """Finds the task of a model by its class, or by the first of its base classes that transformers knows.

    A class outside transformers is a classifier if its config has ``num_labels`` and it has no output embeddings.

    Args:
        model: the model, in a PEFT model or not.

    Raises:
        ValueError: if the model has none of these tasks.
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
        f"the task of {type(model).__name__} is not known. It has to be a transformers model, or derive from one, for "
        f"one of {', '.join(task.value for task in Task)}, or have a config with num_labels. Otherwise use DISLoss in "
        "a loop of your own"
    )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def find_items(
    task: Task,
    inputs: dict[str, Tensor],
    labels: Tensor | None,
    stored: Tensor | None = None,
    positions: Tensor | None = None,
) -> Items:
    """Finds the items of a batch.

    Args:
        task: of the model.
        inputs: of the model.
        labels: ``[B]``, or ``[B, S]`` where items are tokens; or None: every token but padding is an item.
        stored, positions: as for :func:`hf_dis.items.token_items`.

    Raises:
        ValueError: if the labels have a different shape, or no column gives the number of tokens.
        DataError: as :func:`hf_dis.items.token_items`.
    """
    if not task.has_token_items:
        if labels is not None and labels.dim() != 1:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: a {task.value} model has one class id per example, [B]"
            )
        number = len(next(iter(inputs.values())) if labels is None else labels)
        return Items(number, labels, targets=None if stored is None else stored[:, 0])
    side = "decoder_" if task is Task.SEQ2SEQ_LM else ""
    names = f"{side}input_ids", f"{side}inputs_embeds"
    tokens = next((inputs[name] for name in names if inputs.get(name) is not None), labels)
    if tokens is None:
        raise ValueError(
            f"the batch holds {', '.join(inputs)} and no labels: the items of a {task.value} are the tokens of "
            f"{' or '.join(names)}, or of labels; let the data collator add one of these columns"
        )
    mask = inputs.get(f"{side}attention_mask")
    shape, shifts_labels = tokens.shape[:2], task is Task.CAUSAL_LM
    return token_items(labels, mask, shape, shifts_labels, tokens.device, stored, positions)


def split_labels(
    model: nn.Module,
    task: Task,
    batch: dict[str, Tensor],
    label_names: Sequence[str] = ("labels",),
    stored: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Items, dict[str, Tensor]]:
    """Splits a batch into its items and the model's inputs without labels, so that the model computes no loss.

    Args:
        model: the model.
        task: of the model.
        batch: inputs and labels.
        label_names: columns that the model is not given.
        stored, positions: as for :func:`find_items`.

    Raises:
        ValueError, DataError: as :func:`find_items`.
    """
    labels = batch.get("labels")
    inputs = {name: value for name, value in batch.items() if name not in label_names}
    if task is Task.SEQ2SEQ_LM and labels is not None and "decoder_input_ids" not in inputs:
        # The model would make them from its labels.
        inputs["decoder_input_ids"] = base_model(model).prepare_decoder_input_ids_from_labels(labels=labels)
    return find_items(task, inputs, labels, stored, positions), inputs


def num_outputs(model: nn.Module, task: Task) -> int:
    """Counts the classes of a model's output layer: its labels, or its vocabulary with padding.

    Args:
        model: the model, in a PEFT model or not.
        task: of the model.

    Raises:
        ValueError: if a classifier has several labels per example, or fewer than two classes.
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
            f"problem_type is {config.problem_type!r} and num_labels is {config.num_labels} in the configuration of "
            f"{type(model).__name__}: distillation needs single-label classification with two classes or more. Set "
            "problem_type to None and num_labels to the number of classes"
        )
    return config.num_labels
