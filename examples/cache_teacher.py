"""Stores a teacher's targets of a training set, so that students can be distilled without the teacher.

    accelerate launch --num_processes 1 examples/cache_teacher.py --task glyphs --teacher runs/glyphs/teacher \\
        --output_dir runs/glyphs/cache

The training set is the characters of the demo, or the text of run_clm.py. Any number of processes may take part. A run
that was stopped continues when it is started again with the same arguments. With --views n the cache holds n augmented
views of each image; without, the images are cached as they are. docs/cache.md shows how a student is trained from the
cache.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from transformers import HfArgumentParser, default_data_collator

from hf_dis import cache_teacher_targets
from hf_dis.cache import SeededViews
from hf_dis.data import DataError
from hf_dis.teacher.loading import load_teacher


@dataclass
class CacheArguments:
    """Teacher, training set and size of the cache."""

    teacher: str = field(metadata={"help": "Name or path of the teacher's checkpoint."})
    output_dir: str = field(metadata={"help": "The folder of the cache, new or unfinished."})
    task: Literal["glyphs", "text"] = field(default="glyphs", metadata={"help": "The training set."})
    block_size: int = field(default=128, metadata={"help": "Tokens per sequence of the text."})
    views: int = field(default=0, metadata={"help": "Augmented views of each image; 0: images as they are."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the distillation."})
    depth: int | None = field(
        default=None, metadata={"help": "Ranked classes of an item that are stored; by default 32, or 2 for text."}
    )
    sample_size: int | None = field(
        default=None,
        metadata={"help": "Classes sampled from the rest; by default as many as fit into 300 bytes, text 60."},
    )
    batch_size: int = field(default=64, metadata={"help": "Examples per forward of the teacher."})
    num_workers: int = field(default=0, metadata={"help": "Processes that prepare batches, per process of the run."})
    seed: int = field(default=0, metadata={"help": "Seed of views and samples."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Dataset of the Hub to upload the cache to."})


def training_set(arguments: CacheArguments):
    """Makes the training set of the task, augmented if views are wanted, its collator, and its tokenizer or None."""
    if arguments.task == "glyphs":
        from glyph_task import NORMALISE, GlyphImages, augment, whole_batch

        from hf_dis.data import load_glyphs

        glyphs = load_glyphs()["train"]
        if arguments.views:
            return (
                SeededViews(GlyphImages(glyphs, augment), arguments.views, arguments.seed),
                default_data_collator,
                None,
            )
        return GlyphImages(glyphs, NORMALISE), whole_batch, None
    if arguments.views:
        raise SystemExit(f"error: --views is {arguments.views}, and text has no augmentation: leave --views out")
    from clm_task import load_texts, tokenized
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    return tokenized(load_texts(), tokenizer, arguments.block_size)["train"], default_data_collator, tokenizer


def main() -> None:
    (arguments,) = HfArgumentParser(CacheArguments).parse_args_into_dataclasses()
    dataset, collator, tokenizer = training_set(arguments)
    try:
        cache = cache_teacher_targets(
            load_teacher(arguments.teacher),
            dataset,
            arguments.output_dir,
            temperature=arguments.temperature,
            depth=arguments.depth,
            sample_size=arguments.sample_size,
            data_collator=collator,
            processing_class=tokenizer,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            seed=arguments.seed,
        )
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    if int(os.environ.get("RANK", 0)) == 0:  # the launcher numbers the processes
        num_bytes, number = cache.header.num_bytes, len(cache)
        print(f"{number:,} examples in {num_bytes / 1e6:.1f} MB, {num_bytes / number:.0f} bytes each: {cache.path}")
        if arguments.push_to_hub:
            cache.push_to_hub(arguments.push_to_hub)


if __name__ == "__main__":
    main()
