"""Stores a teacher's targets of a training set, to distil from without the teacher.

    accelerate launch --num_processes 1 examples/cache_teacher.py --task glyphs --teacher runs/glyphs/teacher \\
        --output_dir runs/glyphs/cache

The characters of the demo, or the text of run_clm.py. Any number of processes takes part; a run that was stopped is
started again with the same arguments and goes on where it was. With --views n images are augmented, n fixed views of
each; without, they are cached as they are. docs/cache.md shows how a student is trained from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from accelerate import PartialState
from transformers import HfArgumentParser, default_data_collator

from hf_dis import cache_teacher_targets
from hf_dis.cache import SeededViews
from hf_dis.data import DataError
from hf_dis.teacher.loading import load_teacher


@dataclass
class CacheArguments:
    """What is cached, and how much of it."""

    teacher: str = field(metadata={"help": "Name or path of the teacher's checkpoint."})
    output_dir: str = field(metadata={"help": "Where the cache goes, or is to be finished."})
    task: Literal["glyphs", "text"] = field(default="glyphs", metadata={"help": "The training set."})
    block_size: int = field(default=128, metadata={"help": "Tokens of a sequence of the text."})
    views: int = field(default=0, metadata={"help": "Augmented views of each image; 0: one, not augmented."})
    temperature: float = field(default=2.0, metadata={"help": "That the student will be distilled at."})
    depth: int | None = field(
        default=None, metadata={"help": "Ranked classes of a row that are stored; 32, 2 of text, if not given."}
    )
    sample_size: int | None = field(
        default=None,
        metadata={"help": "Classes sampled from the others; as many as fit into 300 bytes, 60 of text, if not given."},
    )
    batch_size: int = field(default=64, metadata={"help": "Examples that the teacher is given at a time."})
    num_workers: int = field(default=0, metadata={"help": "Processes that prepare batches, for each process."})
    seed: int = field(default=0, metadata={"help": "Of views and samples."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Data set of the Hub to upload the cache to."})


def training_set(arguments: CacheArguments):
    """The task's training set, augmented if views are asked for, its collator, and its tokenizer if it has one."""
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
        raise SystemExit(f"error: --views is {arguments.views}: text is not augmented")
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
    num_bytes = sum(shard.num_bytes for shard in cache.header.shards)
    print(
        f"{len(cache):,} examples in {num_bytes / 1e6:.1f} MB, {num_bytes / len(cache):.0f} bytes each: {cache.path}"
    )
    if arguments.push_to_hub:
        cache.push_to_hub(arguments.push_to_hub)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # its threads, alive at the exit, can abort the process
