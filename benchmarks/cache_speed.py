"""The cost of storing targets: a teacher's bare forward against the whole of cache_teacher_targets, images per second.

    python benchmarks/cache_speed.py --json cache_speed.json

Teachers with random weights, images in memory, batches of 64, the default of 300 bytes per item. The bare forward
takes the same batches, output layer included, in turn with the caching; figures are medians of the rounds. ratio is
the images per second of caching over those of the bare forward: reading, keys, ranking, sampling, packing and writing
are the rest.

With --device the teacher is on the device, and both sides bring each batch of images there.
"""

from __future__ import annotations

import statistics
import tempfile

import torch
from common import header, machine, parse, parser, row, write
from timing import stopwatch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_dis import cache_teacher_targets

BATCH = 64


def resnet(num_classes: int, depths: list[int]) -> ResNetForImageClassification:
    """A ResNet with bottlenecks."""
    return ResNetForImageClassification(ResNetConfig(depths=depths, num_labels=num_classes))


def vit(num_classes: int, layers: int) -> ViTForImageClassification:
    """A small vision transformer."""
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
    """Images per second of the forward alone."""
    watch = stopwatch(teacher.device)
    watch.start()
    for batch in images.split(BATCH):
        teacher(pixel_values=batch.to(teacher.device))
    return 1000 * len(images) / watch.stop()


def caching(teacher, images: torch.Tensor) -> float:
    """Images per second of the caching."""
    examples = [{"pixel_values": image} for image in images]
    with tempfile.TemporaryDirectory() as folder:
        watch = stopwatch(teacher.device)
        watch.start()
        cache_teacher_targets(teacher, examples, folder, batch_size=BATCH, show_progress=False)
        return 1000 * len(images) / watch.stop()


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000])
    made.add_argument("--images", type=int, default=256)
    made.add_argument("--rounds", type=int, default=3)
    arguments = parse(made)
    print(f"{machine(arguments.device)}\n")
    print(header("teacher", "C", "bare forward, images/s", "caching, images/s", "ratio"), flush=True)
    records = []
    for name, (build, size) in TEACHERS.items():
        for num_classes in arguments.classes:
            torch.manual_seed(0)
            teacher, images = build(num_classes).eval(), torch.randn(arguments.images, 3, size, size)
            teacher.to(arguments.device)
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
            print(row(name, f"{num_classes:,}", f"{bare:.1f}", f"{cached:.1f}", f"{cached / bare:.0%}"), flush=True)
    write(records, arguments.json, arguments.device)


if __name__ == "__main__":
    main()
