"""The text task: Python's standard library as a corpus, a tokenizer trained on this corpus, and small Llama models.

Everything is on the machine already, so the default of run_clm.py needs no network. Your own texts take the same two
functions: :func:`load_texts`, then :func:`tokenized`.
"""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT = 0.05


def standard_library() -> list[str]:
    """The files of Python's standard library without its tests, shuffled, always in the same order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(str(path) for path in root.rglob("*.py") if not NOT_LIBRARY & set(path.relative_to(root).parts))
    random.Random(0).shuffle(files)
    return files


def load_texts(
    name: str | None = None,
    config: str | None = None,
    train_files: list[str] | None = None,
    validation_files: list[str] | None = None,
    column: str = "text",
) -> DatasetDict:
    """Texts to train on and texts held out, splits ``train`` and ``validation`` with the one column ``text``.

    Args:
        name, config: a dataset and its configuration, as for ``datasets.load_dataset``.
        train_files, validation_files: text files in place of a dataset; lines keep their line breaks.
        column: the column with the texts.

    Without a dataset or files the texts are those of the standard library, one text per file. Without a validation
    split the last twentieth of the training texts is held out.

    Raises:
        ValueError: if there is no such column.
    """
    if name:
        splits = load_dataset(name, config)
    elif train_files:
        files = {"train": train_files} | ({"validation": validation_files} if validation_files else {})
        splits = load_dataset("text", data_files=files, keep_linebreaks=True)
    else:
        files = {"train": standard_library()}
        splits = load_dataset("text", data_files=files, sample_by="document", encoding_errors="replace")
    if column not in splits["train"].column_names:
        raise ValueError(
            f"text_column is {column!r}, but the dataset has the columns {splits['train'].column_names}: name the "
            "one with the texts"
        )
    if "validation" not in splits:
        parts = splits["train"].train_test_split(test_size=HELD_OUT, shuffle=False)
        splits = DatasetDict(train=parts["train"], validation=parts["test"])
    texts = {split: splits[split].select_columns(column) for split in ("train", "validation")}
    return DatasetDict(texts if column == "text" else {k: v.rename_column(column, "text") for k, v in texts.items()})


def train_tokenizer(texts: Dataset, num_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that ends each text with ``<eos>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((batch["text"] for batch in texts.iter(1000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tokenized(texts: DatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int) -> DatasetDict:
    """The texts, joined one after another, as blocks of ``block_size`` tokens with as many labels.

    Raises:
        ValueError: if a split has fewer tokens than one block.
    """

    def blocks(batch: dict[str, list]) -> dict[str, list]:
        ids = [token for text in tokenizer(batch["text"])["input_ids"] for token in text]
        whole = len(ids) - len(ids) % block_size  # the rest of a batch of a thousand texts is dropped
        parts = [ids[start : start + block_size] for start in range(0, whole, block_size)]
        return {"input_ids": parts, "labels": parts}

    splits = texts.map(blocks, batched=True, remove_columns="text", desc="tokenizing")
    for name, split in splits.items():
        if not len(split):
            raise ValueError(
                f"the {name} split of {len(texts[name])} texts does not have {block_size} tokens: give more text, or "
                "a smaller block_size"
            )
    return splits


def build_model(num_tokens: int, width: int, num_layers: int, seed: int, tied: bool = False) -> LlamaForCausalLM:
    """A small Llama, its head tied to the embedding or not; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=num_tokens,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def build_teacher(num_tokens: int) -> LlamaForCausalLM:
    """The larger model."""
    return build_model(num_tokens, width=256, num_layers=4, seed=0)


def build_student(num_tokens: int) -> LlamaForCausalLM:
    """The smaller model."""
    return build_model(num_tokens, width=128, num_layers=2, seed=1)


def train_teacher(train_dataset: Dataset, tokenizer: PreTrainedTokenizerBase, steps: int, args: TrainingArguments):
    """Trains the teacher on the texts with the stock Trainer, and saves it with its tokenizer.

    Args:
        train_dataset: a split that :func:`tokenized` returned.
        tokenizer: of the split.
        steps: optimizer steps of four blocks, 512 tokens.
        args: of the student's run: folder (the teacher goes to ``_teacher`` in ``output_dir``), device and precision.

    Returns:
        the teacher.
    """
    folder = str(Path(args.output_dir) / "_teacher")  # push_to_hub leaves out names that start with _
    return train_on_labels(build_teacher(len(tokenizer)), train_dataset, tokenizer, steps, args, folder)


def train_on_labels(
    model: LlamaForCausalLM,
    train_dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    args: TrainingArguments,
    output_dir: str,
    seed: int = 42,
):
    """Trains a model on the texts with the stock Trainer, and saves it with its tokenizer.

    Args:
        model: that is trained.
        train_dataset, tokenizer, steps: as for :func:`train_teacher`.
        args: device and precision.
        output_dir: for the model.
        seed: of the order of the texts.

    Returns:
        the model.
    """
    own_args = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        logging_steps=25,
        seed=seed,
        save_strategy="no",
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        disable_tqdm=args.disable_tqdm,
        report_to=args.report_to,
    )
    trainer = Trainer(
        model=model,
        args=own_args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    return trainer.accelerator.unwrap_model(trainer.model)
