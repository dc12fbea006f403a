"""Students distilled from a cache beside students with the teacher at hand, on images as they are.

    python benchmarks/cache_match.py --teacher runs/glyphs/teacher --seeds 0 1 2 --json cache_match.json

The glyph task without augmentation, 3,375 characters, temperature 2, four epochs, the demo's settings. For each seed
both train a student: the same initial weights, the same order of the images. sampled: classes are sampled, each by its
defaults with row_sparse_head; with --num_shared_classes 0 row by row, with the teacher as in the demo (K = 128, every
rank resolved).
exact: the student computes all logits, so that only the targets differ. seconds: processor time of the training, one
thread with OMP_NUM_THREADS=1. --sources cached leaves out the teacher, to look at another K alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import ResNetForImageClassification, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from glyph_task import NORMALISE, GlyphImages, student_trainer, whole_batch

from hf_dis import TeacherCache, cache_teacher_targets
from hf_dis.data import load_glyphs

HEAD_RATE = 20
MODES = ("sampled", "exact")


def train(teacher, task, cache: TeacherCache | None, mode: str, seed: int, folder: str, **settings) -> dict:
    """One student; what it reaches and what it took."""
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
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    metrics = trainer.evaluate()
    return {"top1": metrics["eval_top1"], "kl": metrics["eval_kl"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="saved by examples/run_glyphs.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--depth", type=int, help="m of the cache; its default if not given")
    parser.add_argument("--sample_size", type=int, help="T of the cache; its default if not given")
    parser.add_argument("--num_sampled_classes", type=int, help="K from the cache; its default if not given")
    parser.add_argument("--num_shared_classes", type=int, help="K_t of both; the default if not given")
    parser.add_argument("--num_tails", type=int, help="of both; the default if not given")
    parser.add_argument("--num_updated_classes", type=int, help="of both; the default if not given")
    parser.add_argument("--exact_warmup_steps", type=float, default=0.0, help="of both")
    parser.add_argument("--sources", nargs="+", choices=("online", "cached"), default=["online", "cached"])
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    glyphs = load_glyphs()
    names = glyphs["train"].features["label"].names
    task = GlyphImages(glyphs["train"], NORMALISE), GlyphImages(glyphs["test"], NORMALISE), names
    teacher = ResNetForImageClassification.from_pretrained(arguments.teacher).to(memory_format=torch.channels_last)
    tails = {"num_shared_classes": arguments.num_shared_classes, "num_tails": arguments.num_tails}
    cached = {"num_sampled_classes": arguments.num_sampled_classes, **tails}
    online = {"rank_depth": 3375, **tails} if arguments.num_shared_classes == 0 else tails
    records = []
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
        print(f"cache: m = {layout.depth}, T = {layout.sample_size}, {layout.item_bytes} bytes an image\n")
        print("| head | seed | teacher's targets | top-1 | KL to teacher | seconds |\n|---|---|---|---|---|---|")
        for mode in arguments.modes:
            top1 = {source: [] for source in arguments.sources}
            for seed in arguments.seeds:
                for source in arguments.sources:
                    targets, sampled = (cache, cached) if source == "cached" else (None, online)
                    sampled = sampled | {"exact_warmup_steps": arguments.exact_warmup_steps}
                    if mode == "sampled":
                        sampled |= {"row_sparse_head": True, "num_updated_classes": arguments.num_updated_classes}
                    found = train(teacher, task, targets, mode, seed, folder, **sampled)
                    top1[source].append(100 * found["top1"])
                    records.append({"head": mode, "seed": seed, "targets": source, **found})
                    print(
                        f"| {mode} | {seed} | {source} | {found['top1']:.2%} | {found['kl']:.3f} "
                        f"| {found['seconds']:.0f} |",
                        flush=True,
                    )
            for source, values in top1.items():
                print(f"| {mode} | mean | {source} | {statistics.mean(values):.2f}% | | |")
            if len(top1) == 2 and len(arguments.seeds) > 1:
                gaps = [cached - online for cached, online in zip(top1["cached"], top1["online"], strict=True)]
                error = statistics.stdev(gaps) / len(gaps) ** 0.5
                print(f"| {mode} | mean | cached - online | {statistics.mean(gaps):+.2f} ± {error:.2f} points | | |")
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
