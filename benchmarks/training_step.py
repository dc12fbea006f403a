"""Time of a training step of a small network with a huge output layer, against the step's floor, in the real Trainer.

    python benchmarks/training_step.py --json training_step.json

A RegNet of 0.6 M parameters and 256 features on 32x32 images, batches of 128, AdamW; the teacher is of the same kind.
Each method trains for some steps in turn, for several rounds. Its floor is measured right before it, because machines
change their pace: ratio_to_floor is the median over rounds of the ratio of the two medians. ms is the median time of a
step from its batch to the cleared gradient. Methods and their floors:

headless              a loss on the features alone, the head neither run nor stepped: the floor itself
exact                 exact distillation by the library, whose gradient is computed in forward, teacher included;
                      floor: headless and the teacher's bare forward
exact (materialised)  the same with a loss by autograd, which earlier tables call exact; floor: as for exact
dis_online            row_sparse_head, teacher included; floor: headless and the teacher's bare forward
dis_given_targets     row_sparse_head, the teacher's targets computed beforehand; floor: headless
dis_cached            row_sparse_head, from a cache of the teacher's targets, look-up included; floor: headless

The cache has its default of 300 bytes per item: 32 ranked classes and, of 100,000, 75 samples of the tail.

Layouts of DIS: the default is that of classifiers, K = 96 and 16 shared tails of K_t = 416. From a cache all stored
classes take the place of K, and K_t is 512. U = 16 classes per item update the head. In "all update" all sampled
classes update it. In "per item" classes are sampled item by item, K = 128 (from a cache the stored ones and 512
further).

peak_mb is the highest resident size of the last step less the resident size before it. Linux only.

With --device models and batches are on the device, in float32. Steps are timed by its events, and peak_mb is the most
that tensors held in the last step, less what they held before it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import EXACT_NOTE, header, machine, parse, parser, row, write
from head_scaling import GivenTargets
from timing import PeakMemory, peak_memory, stopwatch
from transformers import RegNetConfig, RegNetForImageClassification, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from head_step import materialised_loss

from hf_dis import DISConfig, DISDistillationTrainer, TeacherCache, cache_teacher_targets
from hf_dis.items import Items
from hf_dis.teacher.targets import ALL_CLASSES_CHUNKS

ITEMS, FEATURES, TEMPERATURE = 128, 256, 2.0
PER_ITEM = {"num_shared_classes": 0}
ALL_UPDATE = {"num_updated_classes": 1000}
METHODS = {
    ("headless", None): {},
    ("exact", None): {},
    ("exact (materialised)", None): {},
    ("dis_online", "default"): {},
    ("dis_online", "per item"): PER_ITEM,
    ("dis_given_targets", "default"): {},
    ("dis_given_targets", "all update"): ALL_UPDATE,
    ("dis_given_targets", "per item"): PER_ITEM,
    ("dis_cached", "default"): {},
    ("dis_cached", "all update"): ALL_UPDATE,
    ("dis_cached", "per item"): PER_ITEM,
}
# The floor of these methods includes the teacher's forward.
WITH_TEACHER = ("exact", "exact (materialised)", "dis_online")


def regnet(num_classes: int, seed: int) -> RegNetForImageClassification:
    """The student or teacher; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return RegNetForImageClassification(
        RegNetConfig(
            embedding_size=32,
            hidden_sizes=[64, 128, FEATURES],
            depths=[1, 2, 2],
            groups_width=32,
            layer_type="x",
            num_labels=num_classes,
        )
    )


class HeadlessTrainer(DISDistillationTrainer):
    """The same trainer and optimizer with a loss that the head has no part in."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model.regnet(inputs["pixel_values"]).pooler_output.square().mean()


class MaterialisedTrainer(DISDistillationTrainer):
    """The same trainer with the exact loss by autograd, chunk by chunk of the teacher's targets."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher, items = self.distiller.online_teacher, Items(len(inputs["pixel_values"]))
        logits = model(**inputs).logits
        parts = logits.split(teacher.stream.items_of_chunk(len(items), logits.device, ALL_CLASSES_CHUNKS))
        chunks = zip(parts, teacher.all_classes(inputs, items), strict=True)
        return sum(materialised_loss(part, chunk, TEMPERATURE).sum() for part, chunk in chunks) / len(items)


TRAINERS = {"headless": HeadlessTrainer, "exact (materialised)": MaterialisedTrainer}


class GivenTeacher:
    """Stands for the online teacher: the answers for the one batch that there is."""

    def __init__(self, targets: GivenTargets):
        self.targets = targets

    def __call__(self, inputs, items, check_values: bool = True):
        yield self.targets


class StepTimes(TrainerCallback):
    """Times steps on a device, and measures the memory of the last one."""

    def __init__(self, device: torch.device):
        self.device, self.watch = device, stopwatch(device)
        self.milliseconds: list[float] = []
        self.peak: PeakMemory | None = None
        self.peak_mb: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self.peak = peak_memory(self.device)
        self.watch.start()

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.milliseconds.append(self.watch.stop())
        if state.global_step == 1:
            # Moments that were never written are not in memory yet. Each of the first tens of steps would wait for
            # the pages of the rows that it is the first to touch.
            for moments in optimizer.state.values():
                for tensor in filter(torch.is_tensor, moments.values()):
                    tensor.add_(0)
        if self.peak is not None and state.global_step == state.max_steps:
            self.peak_mb = self.peak.megabytes()


def train(method: str, layout: str | None, num_classes: int, teacher, images: list[dict], num_steps: int) -> StepTimes:
    """Trains for a few steps on the teacher's device; the first, which makes the optimizer's state, is not counted."""
    device = teacher.device
    times = StepTimes(device)
    sampled = layout is not None
    with tempfile.TemporaryDirectory() as folder:
        args = DISConfig(
            output_dir=folder,
            max_steps=num_steps + 1,
            per_device_train_batch_size=ITEMS,
            head_mode="sampled" if sampled else "exact",
            row_sparse_head=sampled,
            hard_label_weight=0.0,
            temperature=TEMPERATURE,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **METHODS[method, layout],
        )
        cache = write_cache(teacher, images, folder) if method == "dis_cached" else None
        trainer = TRAINERS.get(method, DISDistillationTrainer)(
            regnet(num_classes, 0),
            None if cache else teacher,
            args,
            teacher_cache=cache,
            train_dataset=images,
            callbacks=[times],
        )
        if method == "dis_given_targets":
            with torch.no_grad():
                logits = teacher(torch.stack([image["pixel_values"] for image in images]).to(device)).logits
            # One batch, whose items come in any order: the time does not depend on which item is whose.
            targets = GivenTargets(logits, TEMPERATURE, trainer.distiller.sampler.rank_depth)
            trainer.distiller.teacher = GivenTeacher(targets)
        trainer.train()
    times.milliseconds = times.milliseconds[1:]
    if cache:
        times.milliseconds = [ms + look_up_ms(cache, images) for ms in times.milliseconds]
    return times


def write_cache(teacher, images: list[dict], folder: str) -> TeacherCache:
    """The teacher's targets of all images, at the default size."""
    return cache_teacher_targets(
        teacher, images, f"{folder}/cache", temperature=TEMPERATURE, batch_size=ITEMS, show_progress=False
    )


def look_up_ms(cache: TeacherCache, images: list[dict]) -> float:
    """Milliseconds of a look-up, which a dataloader does before the step or in its workers; here it counts."""
    batch = {"pixel_values": torch.stack([image["pixel_values"] for image in images])}
    started = time.perf_counter()
    cache.look_up(batch)
    return 1000 * (time.perf_counter() - started)


@torch.no_grad()
def teacher_forward(teacher, images: list[dict], num_steps: int) -> list[float]:
    """Milliseconds of the teacher's bare forward, a few times."""
    pixels, times = torch.stack([image["pixel_values"] for image in images]).to(teacher.device), []
    watch = stopwatch(teacher.device)
    for _ in range(num_steps):
        watch.start()
        teacher(pixels)
        times.append(watch.stop())
    return times


def measure(
    methods: list[tuple[str, str | None]], num_classes: int, num_steps: int, rounds: int, device: torch.device
) -> tuple[list[dict], float | None]:
    """Records of the methods, and the median milliseconds of the teacher's bare forward, if one needs the teacher."""
    generator = torch.Generator().manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 32, 32, generator=generator)} for _ in range(ITEMS)]
    teacher = regnet(num_classes, 1).eval().to(device)
    bare_forward: list[float] = []
    times: dict[tuple[str, str | None], list[float]] = {method: [] for method in methods}
    ratios: dict[tuple[str, str | None], list[float]] = {method: [] for method in methods}
    peaks = {}
    for _ in range(rounds):
        for method in methods:
            floor = statistics.median(train("headless", None, num_classes, teacher, images, num_steps).milliseconds)
            if method[0] in WITH_TEACHER:
                forward = teacher_forward(teacher, images, num_steps)
                floor += statistics.median(forward)
                bare_forward += forward
            measured = train(*method, num_classes, teacher, images, num_steps)
            times[method] += measured.milliseconds
            ratios[method].append(statistics.median(measured.milliseconds) / floor)
            peaks[method] = measured.peak_mb
    records = [
        {
            "method": method,
            "layout": layout,
            "classes": num_classes,
            "ms": statistics.median(values),
            "samples_per_s": 1000 * ITEMS / statistics.median(values),
            "ratio_to_floor": statistics.median(ratios[method, layout]),
            "peak_mb": peaks[method, layout],
        }
        for (method, layout), values in times.items()
    ]
    return records, statistics.median(bare_forward) if bare_forward else None


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--classes", type=int, default=100_000)
    names = list(dict.fromkeys(name for name, _ in METHODS))
    made.add_argument("--methods", choices=names, nargs="+", default=names, help="each in all of its layouts")
    made.add_argument("--steps", type=int, default=4, help="per method and round")
    made.add_argument("--rounds", type=int, default=6)
    arguments = parse(made)
    methods = [method for method in METHODS if method[0] in arguments.methods]
    sizes = arguments.classes, arguments.steps, arguments.rounds
    records, teacher_ms = measure(methods, *sizes, arguments.device)
    print(machine(arguments.device))
    bare = "" if teacher_ms is None else f"; the teacher's bare forward: {teacher_ms:.0f} ms"
    print(f"{arguments.classes:,} classes{bare}")
    print(f"{EXACT_NOTE}\n")
    print(header("method", "layout", "ms", "samples/s", "ratio to floor", "peak MB"))
    for record in records:
        peak = None if record["peak_mb"] is None else f"{record['peak_mb']:,.0f}"
        speed = f"{record['ms']:,.0f}", f"{record['samples_per_s']:.1f}", f"{record['ratio_to_floor']:.2f}"
        print(row(record["method"], record["layout"], *speed, peak))
    write(records, arguments.json, arguments.device)


if __name__ == "__main__":
    main()
