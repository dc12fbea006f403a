"""The report of run_clm.py, and the plot of its and of run_next_item.py's curves."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from hf_dis.report.style import BLUE, GRAY, GREEN, OLIVE, ORANGE, PURPLE, RED, TEAL, plotted, write_svg

TITLES = {
    "exact": "exact KD",
    "dis": "DIS",
    "exact_in_time": "exact KD in DIS's time",
    "labels": "labels only",
    "labels_in_time": "labels only in DIS's time",
    "dis_cached": "DIS from a cache",
    "dis_1024": "DIS, tails of 1,024",
    "dis_4096": "DIS, tails of 4,096",
    "labels_in_cached_time": "labels only in the time of DIS from a cache",
    "topk": "top-K KD",
    "topk_bucket": "top-K KD with a bucket",
    "negatives": "KD on uniform negatives",
    "trl_chunked": "TRL",
    "liger": "Liger",
}
COLOURS = {
    "exact": GRAY,
    "dis": ORANGE,
    "exact_in_time": BLUE,
    "labels": GREEN,
    "labels_in_time": OLIVE,
    "dis_cached": PURPLE,
    "dis_1024": TEAL,
    "dis_4096": OLIVE,
    "labels_in_cached_time": TEAL,
    "topk": RED,
    "topk_bucket": "#a0693f",
    "negatives": "#c25fa6",
    "trl_chunked": GREEN,
    "liger": "#c7b299",
}
CLOCKS = {"seconds": "seconds of training", "cpu_seconds": "seconds of training, of one processor core"}
QUALITIES = {"kl": "KL to teacher", "perplexity": "perplexity"}


def write_report(output: Path, records: list[dict], minutes: float) -> None:
    """Writes results.json, and report.md with a line per student."""
    lines = [
        f"# Distilling a language model of {records[0]['vocab']:,} tokens",
        "",
        f"{torch.get_num_threads()} threads; the whole run took {minutes:.1f} minutes. Quality is measured on texts "
        "held out of training, KL to the teacher at temperature 1. Seconds are the training time, the teacher's "
        "forward included. Error is the error of the gradient on the student's features, ‖ĝ - g‖ / ‖g‖, at the last "
        "comparison.",
        "",
        "| method | student logits per token | rate, head's | steps | on all tokens | seconds | perplexity "
        "| KL to teacher | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        error = "" if record["gradient_error"] is None else f"{record['gradient_error']:.1%}"
        lines.append(
            f"| {TITLES[record['method']]} | {record['sampled']:,} | {record['learning_rate']:g}, "
            f"{record['head_learning_rate']:g} | {record['steps']} | {record['exact_steps']} "
            f"| {record['seconds']:.0f} | {record['perplexity']:.1f} | {record['kl']:.3f} | {error} |"
        )
    write_lines(output, records, lines)


def write_lines(output: Path, records: list[dict], lines: list[str]) -> None:
    """Writes the records to results.json and the lines to report.md, and prints the lines."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (output / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def plot_curves(
    path: Path,
    records: list[dict],
    qualities: dict[str, str] = QUALITIES,
    is_logarithmic: bool = True,
    clock: str = "seconds",
) -> None:
    """Plots what is measured on held-out data against steps and against seconds of training.

    Args:
        path: of the image.
        records: of the students, each with its ``curve``.
        qualities: what to plot of the curves, and their titles.
        is_logarithmic: the scale of the qualities.
        clock: what to plot against besides steps, one of ``CLOCKS``.
    """
    size = {"figsize": (9, 3 * len(qualities)), "layout": "constrained", "sharey": "row", "squeeze": False}
    with plotted():
        figure, axes = plt.subplots(len(qualities), 2, **size)
        for line, (quality, title) in zip(axes, qualities.items(), strict=True):
            for axis, progress in zip(line, ("step", clock), strict=True):
                for record in records:
                    points = [[point[name] for point in record["curve"]] for name in (progress, quality)]
                    look = {"color": COLOURS[record["method"]], "label": TITLES[record["method"]]}
                    axis.plot(*points, "o-", markersize=3, **look)
                axis.set(xlabel=CLOCKS.get(progress, "steps"), ylabel=title)
                axis.set_yscale("log" if is_logarithmic else "linear")
                axis.grid(alpha=0.3, which="both")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    write_svg(figure, path)
    plt.close(figure)
