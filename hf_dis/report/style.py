"""The look of figures in files: SVG that reads on light and on dark pages; needs matplotlib.

The background is transparent. Text and lines have a contrast of at least 3 with white, and with the dark background of
the documentation, ``#1e2129``. WCAG 2.1 asks for this contrast of graphics (success criterion 1.4.11).
"""

from __future__ import annotations

from pathlib import Path

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#777c85"
BLUE, ORANGE, GREEN, RED = "#2878b5", "#d4650b", "#2f8f4e", "#d62728"
GRAY, OLIVE, PURPLE, TEAL = "#7a7f87", "#8a8a1f", "#9467bd", "#14919b"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, "#a0693f", "#c25fa6", GRAY, OLIVE, TEAL)

STYLE = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "legend.framealpha": 0.0,
    "legend.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
}


def plotted() -> rc_context:
    """A context in which matplotlib plots in these colours."""
    return rc_context(STYLE)


def write_svg(figure: Figure, path: Path) -> None:
    """Writes a figure as SVG with a transparent background; text becomes paths, so no font is needed to read it.

    The same figure gives the same file.

    Args:
        figure: made in :func:`plotted`.
        path: of the file, with the suffix ``.svg``.

    Raises:
        ValueError: if the suffix is a different one.
    """
    if path.suffix != ".svg":
        raise ValueError(f"the figure's file is {path}: figures are written as SVG, so give a name that ends in .svg")
    # Ticks are made when a figure is written, so the colours are needed here too.
    with rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": path.stem}):
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
