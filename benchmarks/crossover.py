"""From how many classes on the drawn ones are computed faster than all of them: one head step, exact against DIS.

    python benchmarks/crossover.py --json crossover.json

Loss forward and backward on random features and teacher logits, 128 rows; medians of interleaved steps. What
``head_mode="auto"`` decides by, ``hf_dis.heads.sampling_pays``, is printed beside the measured ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from head_step import time_head_steps

from hf_dis.heads import sampling_pays

LAYOUTS = {"two strata": (64, 512, 128), "per row": (128, 0, 256)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 3000, 5000, 10_000, 30_000, 100_000])
    parser.add_argument("--features", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--json", type=Path, help="where to write the records")
    arguments = parser.parse_args()
    records = []
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| C | d | layout | K | K_t | exact ms | DIS ms | exact / DIS | auto |")
    print("|---|---|---|---|---|---|---|---|---|")
    for num_classes in arguments.classes:
        for num_features in arguments.features:
            for layout, (sampled, shared, depth) in LAYOUTS.items():
                times = time_head_steps(
                    num_classes,
                    num_features=num_features,
                    num_sampled_classes=sampled,
                    num_shared_classes=shared,
                    rank_depth=depth,
                )
                pays, _ = sampling_pays(num_classes, sampled, shared)
                ratio = times["exact"] / times["dis"]
                chosen = "sampled" if pays else "exact"
                print(
                    f"| {num_classes:,} | {num_features} | {layout} | {sampled} | {shared} | {times['exact']:.0f} "
                    f"| {times['dis']:.0f} | {ratio:.1f} | {chosen} |",
                    flush=True,
                )
                records.append(
                    {
                        "classes": num_classes,
                        "features": num_features,
                        "layout": layout,
                        "sampled": sampled,
                        "shared": shared,
                        "exact_ms": times["exact"],
                        "dis_ms": times["dis"],
                        "ratio": ratio,
                        "auto": chosen,
                    }
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
