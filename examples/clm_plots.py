"""The report and the plot of run_clm.py."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

TITLES = {"exact": "exact KD", "dis": "DIS", "exact_in_time": "exact KD in DIS's time"}
COLOURS = {"exact": "tab:gray", "dis": "tab:orange", "exact_in_time": "tab:blue"}


def write_report(output: Path, records: list[dict], minutes: float) -> None:
    """Writes results.json, and report.md with a line per student."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
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
    (output / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def plot_curves(path: Path, records: list[dict]) -> None:
    """KL to the teacher and perplexity of the held-out texts, against steps and against seconds of training."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharey="row")
    for line, (quality, title) in zip(axes, (("kl", "KL to teacher"), ("perplexity", "perplexity")), strict=True):
        for axis, progress in zip(line, ("step", "seconds"), strict=True):
            for record in records:
                points = [[point[name] for point in record["curve"]] for name in (progress, quality)]
                axis.plot(*points, "o-", markersize=3, color=COLOURS[record["method"]], label=TITLES[record["method"]])
            axis.set(xlabel=f"{progress}s" if progress == "step" else "seconds of training", ylabel=title)
            axis.set_yscale("log")
            axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
