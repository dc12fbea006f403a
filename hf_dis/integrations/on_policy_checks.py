"""Checks of prompts and of what a student writes to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import is_conversational

from hf_dis.integrations.sft_checks import check_chat_template
from hf_dis.models.spread import is_fully_sharded

if TYPE_CHECKING:
    from hf_dis.integrations.gkd import DISGKDConfig

logger = logging.get_logger(__name__)


# Settings of SFT that GKD's collator does not read.
NOT_OF_GKD = ("packing", "eval_packing", "padding_free", "assistant_only_loss", "completion_only_loss")


def check_teacher(args: Any, teacher_model: Any, kwargs: Mapping[str, Any]) -> None:
    """Checks how the teacher of an on-policy training is given.

    Args:
        args: the configuration, with TRL's fields about the teacher, or None.
        teacher_model: the teacher, its name, or None.
        kwargs: further arguments of the trainer.

    Raises:
        ValueError: if there is a cache, or a field about the teacher that would have no effect.
    """
    for name in ("teacher_cache", "eval_teacher_cache"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} holds targets of a given text, and here the student writes the text: pass the teacher itself "
                "as teacher_model"
            )
    given = {} if args is None else vars(args)
    for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
        value = given.get(name)
        if value is not None:
            raise ValueError(
                f"{name} is {value!r}, and hf_dis loads a teacher by name as its checkpoint says: load the teacher "
                f"yourself, pass the model as teacher_model, and leave {name} out"
            )
    named = given.get("teacher_model_name_or_path")
    if named is not None and isinstance(teacher_model, str) and named != teacher_model:
        raise ValueError(
            f"teacher_model is {teacher_model!r}, and teacher_model_name_or_path is {named!r}: name one teacher"
        )


def check_gkd_config(args: DISGKDConfig) -> None:
    """Checks the settings that GKD does not read.

    Raises:
        ValueError: if a setting would have no effect, or DeepSpeed would prepare the teacher.
    """
    for name in NOT_OF_GKD:
        value = getattr(args, name)
        if value != args.__dataclass_fields__[name].default:
            raise ValueError(
                f"{name} is {value}, and GKD prepares conversations in a way of its own, padded, with the loss on the "
                f"last answer: leave {name} out, or train with DISSFTTrainer"
            )
    if args.deepspeed:
        raise ValueError(
            "deepspeed is set: GKD would make an engine of the teacher, which hf_dis keeps whole; use "
            "DISOnPolicyTrainer, or leave deepspeed out"
        )


def check_gkd_teacher(teacher: Any) -> None:
    """Checks that a teacher can write answers on each process alone.

    Args:
        teacher: a model, or None.

    Raises:
        ValueError: if FSDP2 shards the teacher.
    """
    if isinstance(teacher, nn.Module) and is_fully_sharded(teacher):
        raise ValueError(
            "FSDP has sharded the teacher, and GKD lets the teacher write answers on each process alone: load the "
            "teacher whole"
        )


def check_gkd_data(kwargs: Mapping[str, Any]) -> None:
    """Checks what GKD's collator makes batches of.

    Args:
        kwargs: arguments of the trainer.

    Raises:
        ValueError: if there is no tokenizer, or the training data holds no conversations.
    """
    if kwargs.get("data_collator") is not None:
        return
    if kwargs.get("processing_class") is None:
        raise ValueError("processing_class is None: GKD's collator needs the student's tokenizer; pass it")
    dataset = kwargs.get("train_dataset")
    example = None if dataset is None else next(iter(dataset), None)
    if example is not None and "messages" not in example:
        raise ValueError(
            f"the first example has the columns {', '.join(example)} and no 'messages': GKD takes conversations with "
            "an answer at the end; for prompts alone use DISOnPolicyTrainer"
        )


def first_prompt(dataset: Any) -> Any:
    """The prompt of a dataset's first example; None without a dataset.

    Raises:
        ValueError: if the dataset is empty, or the example has no prompt.
    """
    if dataset is None:
        return None
    example = next(iter(dataset), None)
    if example is None:
        raise ValueError("the training dataset is empty: it has to hold prompts to which the student writes")
    if "prompt" not in example:
        raise ValueError(
            f"the first example has the columns {', '.join(example)} and no 'prompt': the student writes to prompts, "
            "so the dataset needs the column 'prompt', a text or a list of messages"
        )
    return example["prompt"]


def check_prompts(
    prompt: Any,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    template_keywords: Mapping[str, Any] | None = None,
) -> None:
    """Checks that a prompt becomes the same tokens for teacher and student; warns if a chat template is left out.

    Args:
        prompt: the first one, a text or a list of messages; None: nothing to check.
        tokenizer: the student's.
        teacher_tokenizer: the teacher's, if known.
        template_keywords: for the chat template.

    Raises:
        ValueError: if messages have no chat template, or the chat templates differ.
    """
    if prompt is None:
        return
    if is_conversational({"prompt": prompt}):
        if tokenizer.chat_template is None:
            raise ValueError(
                "the prompts are lists of messages, and the student's tokenizer has no chat template to make a text "
                "of them. Set tokenizer.chat_template, take the tokenizer of a chat model as processing_class, or "
                "give the prompts as text"
            )
        example = {"messages": prompt, "chat_template_kwargs": template_keywords}
        check_chat_template(tokenizer, teacher_tokenizer, example)
    elif tokenizer.chat_template is not None and not any(token in prompt for token in tokenizer.all_special_tokens):
        logger.warning_once(
            f"the first prompt is the text {prompt[:40]!r}, without a special token, and the tokenizer has a chat "
            "template, which is applied to messages only. If the student is a chat model, give each prompt as a list "
            'of messages, [{"role": "user", "content": ...}]'
        )


def check_prompt_tokens(prompts: Sequence[Sequence[int]]) -> None:
    """Checks that no prompt is empty.

    Args:
        prompts: token ids of each prompt.

    Raises:
        ValueError: if a prompt has no token.
    """
    empty = [number for number, ids in enumerate(prompts) if not len(ids)]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(prompts)} prompts of a batch have no token (the first one is number {empty[0]}). "
            "Remove empty prompts from the dataset, or use a tokenizer that adds a token at the start"
        )


def check_completions(completions: Sequence[Sequence[int]]) -> None:
    """Checks that the student wrote something to every prompt.

    Args:
        completions: token ids of each completion; the end-of-text token counts.

    Raises:
        ValueError: if a completion has no token.
    """
    empty = sum(not len(ids) for ids in completions)
    if empty:
        raise ValueError(
            f"{empty} of {len(completions)} completions of a batch are empty, without even an end-of-text token: "
            "there is nothing to distil. Set max_completion_length to 1 or more, look for max_new_tokens and stop "
            "strings in generation_kwargs, and shorten prompts that fill the student's context"
        )


def warn_of_lengths(longest: float, clipped: float, limit: tuple[str, int | None]) -> None:
    """Warns once if no completion of a batch has an end, and once if all completions are the end-of-text token alone.

    Args:
        longest: tokens of the longest completion of all processes.
        clipped: share of the completions that reached the limit, within [0, 1].
        limit: name and value of the setting that limits a completion.
    """
    name, value = limit
    if clipped == 1:
        logger.warning_once(
            f"all completions of a batch were cut at {name}={value}, none with an end-of-text token: the student "
            f"learns nothing about where to end there. Raise {name}, or set the eos_token_id of the student's "
            "generation_config to the token that ends an answer"
        )
    elif longest <= 1:
        logger.warning_once(
            "all completions of a batch are the end-of-text token alone: the student learns about that token only. "
            "Look at the prompts and the chat template, and train the student by SFT first if it cannot answer"
        )
