"""``hf-dis cache``: stores a teacher's targets of a dataset, for causal language models and image classifiers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import default_data_collator

from hf_dis.cache import TeacherCache, cache_teacher_targets
from hf_dis.checks import require
from hf_dis.commands.parsing import CommandParser
from hf_dis.commands.prepared import prepared_images, prepared_texts, tokenizer_of
from hf_dis.errors import DataError
from hf_dis.models.tasks import Task, find_task
from hf_dis.teacher.loading import load_teacher

DESCRIPTION = "Run a teacher over a dataset once and store its targets."


@dataclass
class CacheArguments:
    """Arguments of ``hf-dis cache``.

    Raises:
        ValueError: if a number is out of its range.
    """

    teacher: str = field(metadata={"help": "Name or folder of the teacher."})
    dataset: str = field(metadata={"help": "Name on the Hub, a folder of files, or one of save_to_disk."})
    output_dir: str = field(metadata={"help": "Folder of the cache, new or unfinished."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    column: str | None = field(default=None, metadata={"help": "Column of the data; by default text or image."})
    block_size: int = field(default=1024, metadata={"help": "Tokens per block of text."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the distillation."})
    depth: int | None = field(
        default=None, metadata={"help": "Ranked classes of an item that are stored; by default 32, or 2 for text."}
    )
    sample_size: int | None = field(
        default=None,
        metadata={
            "help": "Classes sampled from the remaining ones; by default as many as fit into 300 bytes, 60 for text."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Examples per forward of the teacher."})
    num_workers: int = field(default=0, metadata={"help": "Processes that prepare batches, per process of the run."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Dataset of the Hub to upload the cache to."})

    def __post_init__(self) -> None:
        require(self.block_size >= 2, "block_size", self.block_size, "2 or more")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")


def run(argv: Sequence[str]) -> None:
    """Writes the cache, and prints its size and the dataset to train on.

    Args:
        argv: the words after ``hf-dis cache``.

    Raises:
        ValueError, OSError: if teacher, dataset or an argument cannot be used.
    """
    arguments, _ = CommandParser(CacheArguments, "hf-dis cache", DESCRIPTION).parse(argv)
    cache, code = write(arguments)
    if int(os.environ.get("RANK", 0)) == 0:  # the launcher numbers the processes
        size, number = cache.header.num_bytes, len(cache)
        print(f"{number:,} examples in {size / 1e6:.1f} MB, {size / number:.0f} bytes each: {cache.path}")
        print(f"train on: {code}")
        if arguments.push_to_hub:
            cache.push_to_hub(arguments.push_to_hub)


def write(arguments: CacheArguments) -> tuple[TeacherCache, str]:
    """Writes the cache.

    Args:
        arguments: of the command.

    Returns:
        the cache, and the Python expression of the dataset to train on.

    Raises:
        DataError: if the teacher is of an unsupported kind, or the dataset cannot be used.
    """
    teacher = load_teacher(arguments.teacher)
    task, tokenizer = find_task(teacher), None
    named = arguments.dataset, arguments.teacher
    options = {"split": arguments.split} | ({"column": arguments.column} if arguments.column else {})
    if task is Task.CAUSAL_LM:
        options["block_size"] = arguments.block_size
        tokenizer, prepare = tokenizer_of(arguments.teacher), prepared_texts
    elif task is Task.CLASSIFICATION and teacher.main_input_name == "pixel_values":
        prepare = prepared_images
    else:
        raise DataError(
            f"the teacher {arguments.teacher!r} is a {type(teacher).__name__}: hf-dis cache takes causal language "
            "models and image classifiers; call hf_dis.cache_teacher_targets with a dataset of your own"
        )
    cache = cache_teacher_targets(
        teacher,
        prepare(*named, **options),
        arguments.output_dir,
        temperature=arguments.temperature,
        depth=arguments.depth,
        sample_size=arguments.sample_size,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        seed=arguments.seed,
    )
    given = ", ".join([*map(repr, named), *(f"{name}={value!r}" for name, value in options.items())])
    return cache, f"hf_dis.commands.prepared.{prepare.__name__}({given})"
