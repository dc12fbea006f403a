"""From how many classes on the sampled ones are computed faster than all of them: one head step, exact against DIS.

    python benchmarks/crossover.py --json crossover.json

Loss forward and backward, down to the head's dense gradient, on random features and teacher logits; medians of
interleaved steps. One of d (features), N (rows) and the layout (K sampled for each row, G tails of K_t) is changed at a
time. Beside the measured times: what ``head_mode="auto"`` estimates for each at set-up, and decides. The second table
is the number of classes at which the two take equally long, interpolated between those measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from head_step import time_head_steps

from hf_dis import SamplerSpec
from hf_dis.autotune import ROWS, measure_costs

BASE = {"features": 256, "rows": 128, "sampled": 32, "shared": 512, "tails": 4}
PER_ROW = {**BASE, "sampled": 128, "shared": 0, "tails": 1}
SETTINGS = [
    BASE,
    *({**BASE, "features": features} for features in (64, 1024)),
    *({**BASE, "rows": rows} for rows in (32, 512)),
    *({**BASE, "sampled": sampled} for sampled in (16, 64)),
    {**BASE, "tails": 1},
    PER_ROW,
]


def measure(num_classes: int, setting: dict[str, int], repeats: int) -> dict:
    """The times of both steps at one size, and what is estimated for them."""
    names = {"num_sampled_classes": "sampled", "num_shared_classes": "shared", "num_tails": "tails"}
    layout = {name: setting[key] for name, key in names.items()}
    times = time_head_steps(num_classes, setting["rows"], setting["features"], repeats, **layout)
    costs = measure_costs(num_classes, setting["features"], SamplerSpec(**layout))
    scale = setting["rows"] / ROWS
    return {
        "classes": num_classes,
        **setting,
        "exact_ms": times["exact"],
        "dis_ms": times["dis"],
        "ratio": times["exact"] / times["dis"],
        "estimated_exact_ms": costs.exact * scale,
        "estimated_dis_ms": costs.sampled * scale,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000])
    parser.add_argument("--base_classes", type=int, nargs="+", default=[100_000], help="more, for the default layout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{threads}, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| C | d | N | K | K_t | G | exact ms | DIS ms | exact / DIS | estimated | auto |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    records: list[dict] = []
    crossovers: list[tuple[dict, float | None]] = []
    for setting in SETTINGS:
        classes = sorted([*arguments.classes, *(arguments.base_classes if setting is BASE else [])])
        measured = []
        for num_classes in classes:
            record = measure(num_classes, setting, arguments.repeats)
            measured.append(record)
            print(
                f"| {num_classes:,} | {record['features']:,} | {record['rows']} | {record['sampled']} "
                f"| {record['shared']} | {record['tails']} | {record['exact_ms']:.0f} | {record['dis_ms']:.0f} "
                f"| {record['ratio']:.1f} | {record['estimated_exact_ms']:.0f} / {record['estimated_dis_ms']:.0f} "
                f"| {record['auto']} |",
                flush=True,
            )
        records += measured
        crossovers.append((setting, crossover(measured)))
    print("\n| d | N | K | K_t | G | equal at C of about |\n|---|---|---|---|---|---|")
    for setting, equal in crossovers:
        where = f"outside {classes[0]:,}..{classes[-1]:,}" if equal is None else f"{equal:,.0f}"
        print(
            f"| {setting['features']:,} | {setting['rows']} | {setting['sampled']} | {setting['shared']} "
            f"| {setting['tails']} | {where} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
