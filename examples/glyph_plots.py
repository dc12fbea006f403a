"""The report and the plots of the glyph demo."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from glyph_task import NORMALISE, GlyphImages

from hf_dis.report.style import GRAY, ORANGE, plotted, write_svg

TITLES = {"hard_labels": "hard labels", "exact": "exact KD", "dis": "DIS", "ftis": "FTIS", "topk": "top-K"}


def write_report(
    output: Path, records: list[dict], steps: dict[str, float], millions: dict[str, float], minutes: float
) -> None:
    """Writes the table of methods, the models' parameters in millions, and the times."""
    lines = [
        f"# Five ways to distil {records[0]['classes']:,} characters",
        "",
        f"Teacher: {millions['teacher']:.2f} M parameters; students: {millions['student']:.2f} M. The whole run took "
        f"{minutes:.0f} minutes.",
        "",
        "| method | student logits per item | head rate | top-1 | top-5 | KL to teacher | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        share = record["sampled"] / record["classes"]
        lines.append(
            f"| {TITLES[record['method']]} | {record['sampled']:,} ({share:.0%}) | x{record['head_rate']:g} "
            f"| {record['top1']:.1%} | {record['top5']:.1%} | {record['kl']:.2f} | {record['seconds']:.0f} |"
        )
    lines += [
        "",
        "Quality is measured on typefaces held out of training, KL at temperature 1. Seconds are the time of the "
        "whole training run, the teacher's forward included. At this number of classes exact distillation costs about "
        "the same: sampling pays for larger output layers.",
        "",
        f"One head step at 100,000 classes (128 items, 256 features, teacher logits given, {torch.get_num_threads()} "
        "threads): loss forward and backward",
        f"exact {steps['exact']:.0f} ms, DIS {steps['dis']:.0f} ms: {steps['exact'] / steps['dis']:.1f} times faster. "
        f"A dense AdamW pass over the head adds {steps['adamw']:.0f} ms to either.",
    ]
    (output / "report.md").write_text("\n".join(lines) + "\n")


def plot_quality(path: Path, records: list[dict]) -> None:
    """Top-1 and KL to the teacher, by method."""
    with plotted():
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        names = [TITLES[record["method"]] for record in records]
        colours = [ORANGE if record["method"] == "dis" else GRAY for record in records]
        for axis, key, title in ((left, "top1", "top-1 on unseen typefaces"), (right, "kl", "KL to teacher")):
            bars = axis.bar(names, [record[key] for record in records], color=colours)
            axis.bar_label(bars, fmt="{:.1%}" if key == "top1" else "{:.2f}")
            axis.set_title(title)
            axis.margins(y=0.15)
    write_svg(figure, path)
    plt.close(figure)


def plot_confusions(path: Path, student, test_dataset: GlyphImages, names: list[str], num_pairs: int = 24) -> None:
    """The pairs of characters that a student confuses most often: an image of each character and of its prediction."""
    student.eval()
    with torch.no_grad():
        chunks = test_dataset.images.split(512)
        predicted = torch.cat([student(pixel_values=NORMALISE(images)).logits.argmax(1) for images in chunks])
    wrong = (predicted != test_dataset.labels).nonzero()[:, 0].tolist()
    pairs = Counter((int(test_dataset.labels[index]), int(predicted[index])) for index in wrong)
    image_of = {int(label): index for index, label in enumerate(test_dataset.labels)}
    shown = [pair for pair, _ in pairs.most_common() if pair[1] in image_of][:num_pairs]
    with plotted():
        figure, axes = plt.subplots(4, (len(shown) + 3) // 4, figsize=(12, 6.2), layout="constrained", squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (label, taken_for) in zip(axes.flat, shown, strict=False):
            both = [test_dataset.images[image_of[name], 0] for name in (label, taken_for)]
            axis.imshow(255 - torch.cat(both, 1), cmap="gray", vmin=0, vmax=255)
            axis.set_title(f"{names[label]} for {names[taken_for]}", fontsize=8)
        figure.suptitle("Left: a character that the student got wrong; right: its prediction")
    write_svg(figure, path)
    plt.close(figure)
