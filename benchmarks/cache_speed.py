"""What storing targets costs: a teacher's bare forward against the whole of cache_teacher_targets, images a second.

    python benchmarks/cache_speed.py --json cache_speed.json

Teachers with random weights, images in memory, batches of 64, rows of 300 bytes as by default; the bare forward is
that of the same batches, output layer included, in turn with the caching, medians of the rounds. ratio is caching's
share of the bare forward's images a second: reading, keys, ranking, sampling, packing and writing are the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_dis import cache_teacher_targets

BATCH = 64


def resnet(num_classes: int, depths: list[int]) -> ResNetForImageClassification:
    return ResNetForImageClassification(ResNetConfig(depths=depths, num_labels=num_classes))


def vit(num_classes: int, layers: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=112,
            hidden_size=384,
            num_hidden_layers=layers,
            num_attention_heads=6,
            intermediate_size=1536,
            num_labels=num_classes,
        )
    )


TEACHERS = {
    "ResNet-50, 112 px": (lambda num_classes: resnet(num_classes, [3, 4, 6, 3]), 112),
    "ViT-S/16, 112 px": (lambda num_classes: vit(num_classes, 12), 112),
}


@torch.no_grad()
def bare_forward(teacher, images: torch.Tensor) -> float:
    started = time.perf_counter()
    for batch in images.split(BATCH):
        teacher(pixel_values=batch)
    return len(images) / (time.perf_counter() - started)


def caching(teacher, images: torch.Tensor) -> float:
    rows = [{"pixel_values": image} for image in images]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        cache_teacher_targets(teacher, rows, folder, batch_size=BATCH, show_progress=False)
        return len(images) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| teacher | C | bare forward, images/s | caching, images/s | ratio |\n|---|---|---|---|---|", flush=True)
    records = []
    for name, (build, size) in TEACHERS.items():
        for num_classes in arguments.classes:
            torch.manual_seed(0)
            teacher, images = build(num_classes).eval(), torch.randn(arguments.images, 3, size, size)
            bare_forward(teacher, images[:BATCH])
            pairs = [(bare_forward(teacher, images), caching(teacher, images)) for _ in range(arguments.rounds)]
            bare, cached = (statistics.median(values) for values in zip(*pairs, strict=True))
            record = {
                "teacher": name,
                "classes": num_classes,
                "bare_per_s": bare,
                "caching_per_s": cached,
                "ratio": cached / bare,
            }
            records.append(record)
            print(f"| {name} | {num_classes:,} | {bare:.1f} | {cached:.1f} | {cached / bare:.0%} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
