"""Checks of the arguments of a DISSFTTrainer; each error has the value, the expectation and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

if TYPE_CHECKING:
    from hf_dis.integrations.trl import DISSFTConfig, DISSFTTrainer

logger = logging.get_logger(__name__)

# Characters of a rendered example that an error shows.
SHOWN = 40


def check_config(args: DISSFTConfig) -> None:
    """Checks the settings of SFT that exclude distillation by sampled classes.

    Raises:
        ValueError: if ``loss_type`` is not the default.
    """
    if args.loss_type != "nll":
        raise ValueError(
            f"loss_type is {args.loss_type!r}, a loss of SFTTrainer's own on all classes: leave loss_type at 'nll'; "
            "the loss is distillation, and hard_label_weight is the share of cross-entropy in it"
        )


def check_text_only(processing_class: Any) -> None:
    """Checks that the student reads text alone.

    Raises:
        ValueError: if its processing class is a processor, which a vision-language model has.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}, which prepares more than text: "
            "vision-language models are unsupported; pass a causal language model, and its tokenizer as "
            "processing_class"
        )


def check_trainer(trainer: DISSFTTrainer) -> None:
    """Checks a trainer whose host is set up, before the engine is made.

    Raises:
        ValueError: if the student reads more than text.
    """
    check_text_only(trainer.processing_class)
    evaluates = trainer.eval_dataset is not None and trainer.args.per_device_eval_batch_size > 1
    if trainer.padding_free and evaluates and trainer.accelerator.num_processes > 1:
        logger.warning_once(
            "padding-free batches are evaluated on several processes: examples that fill up the last batches count "
            "twice in the means; set per_device_eval_batch_size=1 to count each example once"
        )


def check_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    example: Mapping[str, Any] | None,
) -> None:
    """Checks that a conversation becomes the same text for teacher and student.

    Args:
        tokenizer: the student's.
        teacher_tokenizer: the teacher's, if known; one without a chat template is not compared.
        example: a conversation in the form of TRL's datasets, ``messages``, or ``prompt`` and ``completion``; None
            where the data does not hold conversations.

    Raises:
        ValueError: if the texts differ; shows where.
    """
    if example is None or teacher_tokenizer is None or teacher_tokenizer.chat_template is None:
        return
    if tokenizer.chat_template == teacher_tokenizer.chat_template:
        return
    ours, theirs = _rendered(tokenizer, example), _rendered(teacher_tokenizer, example)
    if ours != theirs:
        same = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        start = max(0, same - SHOWN // 2)
        ours, theirs = (text[start : start + SHOWN] for text in (ours, theirs))
        raise ValueError(
            f"teacher and student have different chat templates: the first example has {ours!r} by the student's and "
            f"{theirs!r} by the teacher's, and the teacher was trained on its own format only. Train with its "
            "template: set chat_template of the student's tokenizer, or chat_template_path; if the teacher was "
            "trained with the student's template, pass the student's tokenizer as teacher_processing_class too"
        )


def _rendered(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any]) -> str:
    messages = example["messages"] if "messages" in example else [*example["prompt"], *example["completion"]]
    keywords = example.get("chat_template_kwargs") or {}
    return tokenizer.apply_chat_template(messages, tools=example.get("tools"), tokenize=False, **keywords)
