"""The chat task: questions about functions of Python's standard library, answered by their docstrings.

Everything is on the machine already, so the default of run_sft.py needs no network. Your own chats come by
:func:`load_chats` in any format that TRL takes.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from clm_task import HELD_OUT, build_teacher, standard_library, train_tokenizer
from datasets import Dataset, DatasetDict, load_dataset
from transformers import HfArgumentParser, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_dis.integrations.trl import DISSFTConfig

USER, ASSISTANT = "<|user|>", "<|assistant|>"
# What stands between the markers of a generation is supervised with assistant_only_loss.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Settings of SFT that prepare the chats.
PREPARATION = ("max_length", "packing", "assistant_only_loss")
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_chats(
    name: str | None = None,
    config: str | None = None,
    train_files: list[str] | None = None,
    validation_files: list[str] | None = None,
) -> DatasetDict:
    """Loads the splits ``train`` and ``validation`` in a format that TRL takes.

    Without a dataset or files the chats are those of :func:`docstring_chats`. Without a validation split the last
    twentieth of the training split is held out.

    Args:
        name, config: a dataset and its configuration, as for ``datasets.load_dataset``.
        train_files, validation_files: files in place of a dataset, of JSON, JSON lines, Parquet or CSV.

    Raises:
        ValueError: if a file is of an unsupported kind.
    """
    if name:
        splits = load_dataset(name, config)
    elif train_files:
        files = {"train": train_files} | ({"validation": validation_files} if validation_files else {})
        splits = load_dataset(_reader(train_files[0]), data_files=files)
    else:
        splits = DatasetDict(train=Dataset.from_generator(docstring_chats))
    if "validation" not in splits:
        parts = splits["train"].train_test_split(test_size=HELD_OUT, shuffle=False)
        splits = DatasetDict(train=parts["train"], validation=parts["test"])
    return DatasetDict({name: splits[name] for name in ("train", "validation")})


def _reader(file: str) -> str:
    suffix = Path(file).suffix
    if suffix not in READERS:
        raise ValueError(f"{file} has the suffix {suffix!r}: chats are read from files {', '.join(READERS)}")
    return READERS[suffix]


def docstring_chats() -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yields a chat of one question and one answer per docstring: the signature, and the docstring."""
    for file in standard_library():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old files
            tree = ast.parse(Path(file).read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                answer = ast.get_docstring(node)
                if answer:
                    question = f"{Path(file).stem}: {_signature(node)}"
                    yield {
                        "messages": [
                            {"role": "user", "content": question},
                            {"role": "assistant", "content": answer.strip()},
                        ]
                    }


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}({', '.join(map(ast.unparse, node.bases))})"
    return f"def {node.name}({ast.unparse(node.args)})"


def chat_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the standard library's files, with two tokens more and a chat template."""
    files = load_dataset(
        "text", data_files=standard_library(), sample_by="document", encoding_errors="replace", split="train"
    )
    tokenizer = train_tokenizer(files, num_tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def parsed(kinds: tuple[type, type], methods: Collection[str], from_scratch: dict[str, Any]) -> tuple[Any, Any]:
    """Parses the command line of an example; an unknown method ends it with a message.

    Args:
        kinds: dataclasses of the example, with ``methods`` and ``model_name_or_path``, and of the training.
        methods: that the example knows.
        from_scratch: defaults where no student is named.
    """
    parser = HfArgumentParser(kinds)
    given = parser.parse_args()
    unknown = set(given.methods) - set(methods)
    if unknown:
        parser.error(f"unknown methods {sorted(unknown)}: choose from {', '.join(methods)}")
    if given.model_name_or_path is None:
        parser.set_defaults(**from_scratch)
    return parser.parse_args_into_dataclasses()


class PlainSFT(SFTTrainer):
    """SFTTrainer with the loss of the model: on a processor TRL's loss by tiles takes twice the time."""

    compute_loss = Trainer.compute_loss


def train_teacher(
    splits: DatasetDict, tokenizer: PreTrainedTokenizerFast, steps: int, args: DISSFTConfig
) -> LlamaForCausalLM:
    """Trains the teacher on the chats by plain SFT, and saves it with its tokenizer.

    Args:
        splits: of :func:`load_chats`.
        tokenizer: with a chat template.
        steps: optimizer steps.
        args: of the student's run: how the chats are prepared, the folder (the teacher goes to ``_teacher`` in
            ``output_dir``), device and precision.

    Returns:
        the teacher.
    """
    given = {name: getattr(args, name) for name in ("per_device_train_batch_size", *PREPARATION)}
    return fine_tuned(build_teacher(len(tokenizer)), "_teacher", splits, tokenizer, steps, args, **given)


def fine_tuned(
    model: LlamaForCausalLM,
    name: str,
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    args: TrainingArguments,
    **settings: Any,
) -> LlamaForCausalLM:
    """Trains a model on the chats by plain SFT, and saves the model with its tokenizer.

    Args:
        model: with initial weights.
        name: of its folder in ``output_dir``; push_to_hub leaves out names that start with _.
        splits: of :func:`load_chats`.
        tokenizer: with a chat template.
        steps: optimizer steps.
        args: of the student's run: the folder, device and precision.
        **settings: of ``SFTConfig``, batch size and preparation of the chats among them.

    Returns:
        the model, loaded from its folder.
    """
    sft_args = SFTConfig(
        output_dir=str(Path(args.output_dir) / name),
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        logging_steps=25,
        save_strategy="no",
        gradient_checkpointing=args.gradient_checkpointing,
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        disable_tqdm=args.disable_tqdm,
        report_to=args.report_to,
        **settings,
    )
    trainer = PlainSFT(model, sft_args, train_dataset=splits["train"], processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return LlamaForCausalLM.from_pretrained(sft_args.output_dir)
