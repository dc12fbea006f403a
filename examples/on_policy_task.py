"""Prompts to write to, and the quality of what a student writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

Prompt = str | list[dict[str, Any]]


def prompts_of(splits: DatasetDict) -> DatasetDict:
    """Takes the prompts out of chats: the column ``prompt``, or all messages before the last answer.

    Args:
        splits: with a column ``prompt`` or ``messages``.

    Returns:
        the splits with the one column ``prompt``.

    Raises:
        ValueError: if there is neither column.
    """
    columns = splits["train"].column_names
    if "prompt" in columns:
        return splits.select_columns("prompt")
    if "messages" not in columns:
        raise ValueError(
            f"the dataset has the columns {', '.join(columns)}: prompts are read from the column 'prompt', or from "
            "'messages', whose last message is left out"
        )
    return splits.map(
        lambda row: {"prompt": row["messages"][:-1]}, remove_columns=columns, desc="taking the prompts out of chats"
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Prompts as the student is given them, padded on the left."""
    if isinstance(prompts[0], str):
        ids = tokenizer(list(prompts))["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")


def written(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> Iterator[tuple[Tensor, int]]:
    """Yields the token ids of each prompt with the student's completion, ``[S]``, and the length of the prompt.

    Args:
        student: samples at temperature 1.
        tokenizer: of the student.
        prompts: of one batch.
        max_new_tokens: of a completion at most.
    """
    inputs = _tokens(tokenizer, prompts).to(student.device)
    made = student.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    start = inputs["input_ids"].shape[1]
    for ids, mask in zip(made, inputs["attention_mask"].bool(), strict=True):
        completion = ids[start:]
        ends = (completion == tokenizer.eos_token_id).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(completion)
        prompt = ids[:start][mask]
        yield torch.cat([prompt, completion[:length]]), len(prompt)


@torch.no_grad()
def quality(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Lets the student write, and compares it with the teacher on all tokens of the vocabulary at temperature 1.

    Args:
        student, teacher: on one device.
        tokenizer: of both.
        prompts: with the column ``prompt``.
        max_new_tokens: of a completion at most.
        batch_size: prompts at a time.
        seed: of the samples.

    Returns:
        means over the tokens of all completions, and the mean ``length`` of a completion. The means are ``kl``, the KL
        divergence of the student from the teacher, ``reverse_kl``, that of the teacher from the student, and
        ``log_likelihood`` by the teacher.
    """
    set_seed(seed)
    student.eval()
    teacher.eval()
    rows, number = [], 0
    for batch in prompts.batch(batch_size):
        for ids, start in written(student, tokenizer, batch["prompt"], max_new_tokens):
            own, theirs = (
                model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1)
                for model in (student, teacher)
            )
            gap = theirs - own
            likelihood = theirs.gather(1, ids[start:, None])[:, 0]
            rows.append(torch.stack([(theirs.exp() * gap).sum(1), -(own.exp() * gap).sum(1), likelihood], 1))
            number += 1
    kl, reverse_kl, log_likelihood = torch.cat(rows).double().mean(0).tolist()
    length = sum(map(len, rows)) / number
    return {"kl": kl, "reverse_kl": reverse_kl, "log_likelihood": log_likelihood, "length": length}
