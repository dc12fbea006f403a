"""Students distilled from a cache beside students with a loaded teacher, on images without augmentation.

    python benchmarks/cache_match.py --teacher runs/glyphs/teacher --seeds 0 1 2 --json cache_match.json

The glyph task without augmentation, 3,375 characters, temperature 2, four epochs, the demo's settings. For each seed
both sources of targets train a student: the same initial weights, the same order of the images.

sampled: classes are sampled, from each source by its defaults, with row_sparse_head. With --num_shared_classes 0 they
are sampled item by item, with the teacher as in the demo (K = 128, every rank resolved).
exact: the student computes all logits, so that only the targets differ.

seconds is the processor time of the training, one thread with OMP_NUM_THREADS=1; with --device it is the time of the
training on the device. --sources cached leaves out the
teacher, for a look at another K alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import header, machine, parse, parser, row, write
from timing import stopwatch
from transformers import set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from glyph_task import NORMALISE, GlyphImages, load_teacher, student_trainer, whole_batch

from hf_dis import TeacherCache, cache_teacher_targets
from hf_dis.data import load_glyphs

HEAD_RATE = 20
MODES, SOURCES = ("sampled", "exact"), ("online", "cached")


def settings_of(arguments: argparse.Namespace, mode: str, source: str) -> dict:
    """The settings of a student besides those of the demo."""
    settings = {
        "use_cpu": arguments.device.type == "cpu",
        "num_shared_classes": arguments.num_shared_classes,
        "num_tails": arguments.num_tails,
        "exact_warmup_steps": arguments.exact_warmup_steps,
    }
    if source == "cached":
        settings["num_sampled_classes"] = arguments.num_sampled_classes
    elif arguments.num_shared_classes == 0:
        settings["rank_depth"] = 3375
    if mode == "sampled":
        settings |= {"row_sparse_head": True, "num_updated_classes": arguments.num_updated_classes}
    return settings


def train(teacher, task, cache: TeacherCache | None, mode: str, seed: int, folder: str, **settings) -> dict:
    """Quality of one student, and the time of its training."""
    trainer = student_trainer(
        teacher,
        task,
        HEAD_RATE,
        cache,
        output_dir=folder,
        head_mode=mode,
        seed=seed,
        disable_tqdm=True,
        **settings,
    )
    set_seed(seed)
    seconds = stopwatch(torch.device(trainer.args.device.type), cpu_time=True).milliseconds(trainer.train) / 1000
    metrics = trainer.evaluate()
    return {"top1": metrics["eval_top1"], "kl": metrics["eval_kl"], "seconds": seconds}


def compare(arguments: argparse.Namespace, mode: str, teacher, task, cache: TeacherCache, folder: str) -> list[dict]:
    """Records of the students of one mode, each printed as it is made."""
    records = []
    for seed in arguments.seeds:
        for source in arguments.sources:
            settings = settings_of(arguments, mode, source)
            found = train(teacher, task, cache if source == "cached" else None, mode, seed, folder, **settings)
            records.append({"head": mode, "seed": seed, "targets": source, **found})
            quality = f"{found['top1']:.2%}", f"{found['kl']:.3f}", f"{found['seconds']:.0f}"
            print(row(mode, seed, source, *quality), flush=True)
    return records


def print_means(mode: str, records: list[dict]) -> None:
    """Prints the mean top-1 of each source, and of their difference."""
    top1: dict[str, list[float]] = {}
    for record in records:
        top1.setdefault(record["targets"], []).append(100 * record["top1"])
    for source, values in top1.items():
        print(row(mode, "mean", source, f"{statistics.mean(values):.2f}%", None, None))
    if len(top1) == 2 and len(top1["cached"]) > 1:
        gaps = [cached - online for cached, online in zip(top1["cached"], top1["online"], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        print(row(mode, "mean", "cached - online", f"{statistics.mean(gaps):+.2f} ± {error:.2f} points", None, None))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--teacher", required=True, help="saved by examples/run_glyphs.py")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    made.add_argument("--depth", type=int, help="m of the cache; its default if not given")
    made.add_argument("--sample_size", type=int, help="T of the cache; its default if not given")
    made.add_argument("--num_sampled_classes", type=int, help="K from the cache; its default if not given")
    made.add_argument("--num_shared_classes", type=int, help="K_t of both; the default if not given")
    made.add_argument("--num_tails", type=int, help="G of both; the default if not given")
    made.add_argument("--num_updated_classes", type=int, help="U of both; the default if not given")
    made.add_argument("--exact_warmup_steps", type=float, default=0.0, help="of both")
    made.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    return parse(made)


def main() -> None:
    arguments = parse_arguments()
    logging.set_verbosity_error()
    glyphs = load_glyphs()
    names = glyphs["train"].features["label"].names
    task = GlyphImages(glyphs["train"], NORMALISE), GlyphImages(glyphs["test"], NORMALISE), names
    teacher = load_teacher(arguments.teacher)
    records = []
    print(machine(arguments.device))
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_teacher_targets(
            teacher,
            task[0],
            f"{folder}/cache",
            depth=arguments.depth,
            sample_size=arguments.sample_size,
            data_collator=whole_batch,
            batch_size=256,
            show_progress=False,
        )
        layout = cache.header.layout
        print(f"cache: m = {layout.depth}, T = {layout.sample_size}, {layout.item_bytes} bytes per image\n")
        print(header("head", "seed", "teacher's targets", "top-1", "KL to teacher", "seconds"))
        for mode in arguments.modes:
            found = compare(arguments, mode, teacher, task, cache, folder)
            print_means(mode, found)
            records += found
    write(records, arguments.json, arguments.device)


if __name__ == "__main__":
    main()
