"""The figures of a report as SVG that follows the page's colours; needs matplotlib.

Lines and text have stand-in colours, which become variables of the page's style sheet: one figure serves light and
dark pages. Names of runs and logs never enter an SVG: legends are text of the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

# A stand-in for the colour of text, and one for each series; series share colours beyond the eighth.
INK, SERIES = "#00ff01", [f"#0000{number:02x}" for number in range(1, 9)]
# Curves of more points are thinned: of each interval the lowest and the highest value stay.
INTERVALS = 250
# Points of a short curve are marked.
MARKED = 40
SIZE = (4.6, 2.7)
COLOURS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    **dict.fromkeys(COLOURS, INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Point = tuple[float, float]


@dataclass
class Series:
    """A curve.

    Attributes:
        label: for the legend.
        points: step and value.
        number: of its colour, from 0 on.
    """

    label: str
    points: list[Point]
    number: int


def curves(name: str, series: Sequence[Series], level: float | None = None) -> str:
    """Plots curves over steps as SVG.

    Args:
        name: of the figure, unlike those of other figures of the page.
        series: the curves; values that are not finite are left out.
        level: a value that is marked by a dashed line.
    """
    with rc_context({**STYLE, "svg.hashsalt": name}):
        return _svg(_curves(series, level, SERIES, INK), name)


def save_curves(path: Path, series: Sequence[Series], level: float | None = None) -> None:
    """Plots curves over steps, with a legend, as a PNG on white.

    Args:
        path: of the PNG.
        series, level: as for :func:`curves`.
    """
    with rc_context({**STYLE, **dict.fromkeys(COLOURS, "black")}):
        figure = _curves(series, level, [f"C{number}" for number in range(len(SERIES))], "black")
        figure.axes[0].legend([one.label for one in series], frameon=False)
        figure.savefig(path, dpi=160)


def _curves(series: Sequence[Series], level: float | None, colours: Sequence[str], ink: str) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    for one in series:
        points = thinned([point for point in one.points if math.isfinite(point[1])])
        marker = "." if len(points) <= MARKED else None
        axis.plot(*zip(*points, strict=True), color=colours[one.number % len(colours)], marker=marker)
    if level is not None:
        axis.axhline(level, color=ink, linestyle="--", linewidth=1)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def proposals(name: str, snapshots: Sequence[dict[str, Any]]) -> str:
    """Plots the fitted proposal and the measured signal at every snapshot as SVG; all but the last are hidden.

    Args:
        name: of the figure; snapshot i is the group with the id ``<name>-<i>``.
        snapshots: as :func:`hf_dis.report.snapshots.snapshot` makes them, one or more.
    """
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(SIZE[0], 3.2), layout="constrained")
        axis = figure.subplots()
        for number, shot in enumerate(snapshots):
            _draw_proposal(axis, shot, f"{name}-{number}")
        axis.set(xscale="log", yscale="log", xlabel="rank of the class in the teacher's order", ylabel="density")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(LogFormatter())
            side.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        svg = _svg(figure, name)
    for number in range(len(snapshots) - 1):
        svg = re.sub(rf'(<g id="{name}-{number}(?:-fit)?")', r'\1 style="display:none"', svg)
    return svg


def _draw_proposal(axis: Axes, shot: dict[str, Any], gid: str) -> None:
    edges = [edge + 1 for edge in shot["edges"]]
    # A density of zero has no place on a logarithmic axis.
    measured = [value if value > 0 else math.nan for value in shot["measured"]]
    axis.stairs(measured, edges, color=SERIES[0], baseline=None, gid=gid)
    axis.stairs(shot["fitted"], edges, color=SERIES[1], baseline=None, gid=f"{gid}-fit", linewidth=1.8)


def thinned(points: list[Point]) -> list[Point]:
    """Points of a long curve: the lowest and the highest of each interval, the first and the last."""
    if len(points) <= 2 * INTERVALS:
        return points
    kept = {0, len(points) - 1}
    size = math.ceil(len(points) / INTERVALS)
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        kept |= {min(part, key=lambda at: points[at][1]), max(part, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def _svg(figure: Figure, name: str) -> str:
    """The SVG element alone, with the page's colours, and with ids of its own."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(rf' id="(?!{name}-)[a-z]+[\w.]*_\d+"', "", text).replace(INK, "currentColor")
    for number, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--series-{number})")
    return re.sub(r"\n\s*", "\n", text)
