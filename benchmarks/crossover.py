"""The number of classes from which sampled ones are computed faster than all of them: one head step, exact and DIS.

    python benchmarks/crossover.py --json crossover.json

Loss forward and backward, down to the head's dense gradient, on random features and teacher logits; medians of
interleaved steps. One of d (features), N (items) and the layout (K of 2 K ranks per item, G tails of K_t) is changed
at a time. exact is the library's own exact loss from the head's input. exact (materialised) is the loss by
autograd, which earlier tables call exact. exact / DIS is the ratio of the library's two losses.

Beside the measured times are the times that ``head_mode="auto"`` estimates at set-up, and its decision. The second
table is the number of classes at which exact and DIS take equally long, interpolated between those measured.

With --device everything is on the device, in float32, and steps are timed by its events.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import torch
from common import EXACT_NOTE, header, machine, parse, parser, row, write
from timing import stopwatch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from head_step import time_head_steps

from hf_dis import SamplerSpec
from hf_dis.autotune import measure_costs

BASE = {"features": 256, "items": 128, "sampled": 32, "shared": 512, "tails": 16}
PER_ITEM = {**BASE, "sampled": 128, "shared": 0, "tails": 1}
SETTINGS = [
    BASE,
    *({**BASE, "features": features} for features in (64, 1024)),
    *({**BASE, "items": items} for items in (32, 512)),
    *({**BASE, "sampled": sampled} for sampled in (16, 64)),
    {**BASE, "tails": 1},
    PER_ITEM,
]


def measure(num_classes: int, setting: dict[str, int], repeats: int, device: torch.device) -> dict:
    """The times of the steps at one size, and the estimates for them."""
    sampled, shared, tails = (setting[key] for key in ("sampled", "shared", "tails"))
    sizes = {"num_sampled_classes": sampled, "rank_depth": 2 * sampled, "num_shared_classes": shared}
    spec = SamplerSpec(**sizes, num_tails=tails)
    times = time_head_steps(
        num_classes,
        spec,
        setting["items"],
        setting["features"],
        repeats,
        device=device,
        milliseconds=stopwatch(device).milliseconds,
    )
    costs = measure_costs(num_classes, setting["features"], spec, num_items=setting["items"], device=device)
    return {
        "classes": num_classes,
        **setting,
        "exact_ms": times["exact"],
        "exact_materialised_ms": times["exact (materialised)"],
        "dis_ms": times["dis"],
        "ratio": times["exact"] / times["dis"],
        "estimated_exact_ms": costs.exact,
        "estimated_dis_ms": costs.sampled,
        "auto": "sampled" if costs.sampling_pays else "exact",
    }


def crossover(records: list[dict]) -> float | None:
    """Classes at which both take equally long, from records in the order of their classes; None if outside them."""
    for below, above in itertools.pairwise(records):
        if below["ratio"] < 1 <= above["ratio"]:
            low, high = math.log(below["ratio"]), math.log(above["ratio"])
            share = -low / (high - low)
            return math.exp((1 - share) * math.log(below["classes"]) + share * math.log(above["classes"]))
    return None


def print_record(record: dict) -> None:
    """Prints one line of the first table."""
    names = ("exact_ms", "exact_materialised_ms", "dis_ms")
    times = *(f"{record[name]:.0f}" for name in names), f"{record['ratio']:.1f}"
    estimated = f"{record['estimated_exact_ms']:.0f} / {record['estimated_dis_ms']:.0f}"
    print(row(f"{record['classes']:,}", *setting_cells(record), *times, estimated, record["auto"]), flush=True)


def setting_cells(setting: dict) -> list[object]:
    """The cells d, N, K, K_t and G of a table."""
    return [f"{setting['features']:,}", *(setting[key] for key in ("items", "sampled", "shared", "tails"))]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--classes", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000])
    made.add_argument("--base_classes", type=int, nargs="+", default=[100_000], help="more, for the default layout")
    made.add_argument("--repeats", type=int, default=5)
    arguments = parse(made)
    print(machine(arguments.device))
    print(f"{EXACT_NOTE}\n")
    layout = ("d", "N", "K", "K_t", "G")
    print(header("C", *layout, "exact ms", "exact (materialised) ms", "DIS ms", "exact / DIS", "estimated", "auto"))
    records: list[dict] = []
    crossovers: list[tuple[dict, list[int], float | None]] = []
    for setting in SETTINGS:
        classes = sorted([*arguments.classes, *(arguments.base_classes if setting is BASE else [])])
        measured = []
        for num_classes in classes:
            measured.append(measure(num_classes, setting, arguments.repeats, arguments.device))
            print_record(measured[-1])
        records += measured
        crossovers.append((setting, classes, crossover(measured)))
    print(f"\n{header(*layout, 'equal at C of about')}")
    for setting, classes, equal in crossovers:
        where = f"outside {classes[0]:,}..{classes[-1]:,}" if equal is None else f"{equal:,.0f}"
        print(row(*setting_cells(setting), where))
    write(records, arguments.json, arguments.device)


if __name__ == "__main__":
    main()
