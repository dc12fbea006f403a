"""Plots the records that the benchmarks wrote with --json.

    python benchmarks/plots.py --head_scaling head_scaling.json --training_step training_step.json \\
        --crossover crossover.json --output_dir docs/images

One SVG for each file, named as the benchmark. benchmarks/quality_vs_k.py makes its own plot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from hf_dis.report.style import GRAY, INK, plotted, write_svg

TITLES = {
    "exact": "exact",
    "exact (materialised)": "exact, by autograd",
    "chunked_exact": "exact, by chunks",
    "liger": "Liger",
    "partial_fc": "uniform tenth (PartialFC)",
    "dis_dense": "DIS, dense gradient",
    "dis_row_sparse": "DIS, row-sparse",
    "headless": "no head (floor)",
    "dis_online": "DIS, online teacher",
    "dis_given_targets": "DIS, given targets",
    "dis_cached": "DIS, from a cache",
}


def plot_head_scaling(records: list[dict]) -> plt.Figure:
    """Time of a head step by the number of classes, one panel for each layout."""
    layouts = list(dict.fromkeys(record["layout"] for record in records))
    figure, axes = plt.subplots(1, len(layouts), figsize=(5 * len(layouts), 4), sharey=True, squeeze=False)
    for axis, layout in zip(axes[0], layouts, strict=True):
        here = [record for record in records if record["layout"] == layout]
        for method in dict.fromkeys(record["method"] for record in here):
            measured = [r for r in here if r["method"] == method and not r["extrapolated"] and r["ms"] is not None]
            line = axis.plot([r["classes"] for r in measured], [r["ms"] for r in measured], "o-", label=TITLES[method])
            beyond = [r for r in here if r["method"] == method and r["extrapolated"]]
            for record in beyond:
                ends = [measured[-1], record]
                axis.plot([r["classes"] for r in ends], [r["ms"] for r in ends], ":", color=line[0].get_color())
        axis.set(xscale="log", yscale="log", xlabel="classes", title=layout)
    axes[0, 0].set_ylabel("ms per step (dotted: extrapolated)")
    axes[0, -1].legend(fontsize="small")
    return figure


def plot_training_step(records: list[dict]) -> plt.Figure:
    """Time of a whole training step over the time of its floor."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    names = [", ".join(filter(None, (TITLES[record["method"]], record["layout"]))) for record in records]
    bars = axis.barh(names, [record["ratio_to_floor"] for record in records], color=GRAY)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set(xlabel="time of a training step / floor", title=f"{records[0]['classes']:,} classes")
    axis.margins(x=0.12)
    return figure


def plot_crossover(records: list[dict]) -> plt.Figure:
    """The ratio of exact to DIS by the number of classes, a line for each setting."""
    figure, axis = plt.subplots(figsize=(6, 4))
    keys = ("features", "items", "sampled", "shared", "tails")
    for setting in dict.fromkeys(tuple(record[key] for key in keys) for record in records):
        here = [record for record in records if tuple(record[key] for key in keys) == setting]
        features, items, sampled, shared, tails = setting
        label = f"d={features}, N={items}, K={sampled}" + (f", {tails} x {shared}" if shared else "")
        axis.plot([r["classes"] for r in here], [r["ratio"] for r in here], "o-", label=label)
    axis.axhline(1, color=INK, linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="classes", ylabel="exact / DIS, time of a head step")
    axis.legend(fontsize="small")
    return figure


PLOTS: dict[str, Callable[[list[dict]], plt.Figure]] = {
    "head_scaling": plot_head_scaling,
    "training_step": plot_training_step,
    "crossover": plot_crossover,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PLOTS:
        parser.add_argument(f"--{name}", type=Path, help=f"records of {name}.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    for name, plot in PLOTS.items():
        path = vars(arguments)[name]
        if path is not None:
            with plotted():
                figure = plot(json.loads(path.read_text()))
            write_svg(figure, arguments.output_dir / f"{name}.svg")


if __name__ == "__main__":
    main()
