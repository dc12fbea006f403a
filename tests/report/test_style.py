"""Figures in files read on light and dark pages."""

import re

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pages import ROOT

from hf_dis.report.style import COLOURS, GRAY, INK, plotted, write_svg

FIGURES = sorted((ROOT / "docs" / "images").glob("*.svg"))


def luminance(colour):
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    """The contrast of two colours as WCAG 2.1 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#1e2129"], ids=["light", "dark"])
def test_every_colour_stands_out(page):
    assert all(contrast(colour, page) >= 3 for colour in (INK, *COLOURS))


def test_a_figure_is_transparent_has_these_colours_only_and_is_written_alike_twice(tmp_path):
    written = []
    for name in ("first", "second"):
        with plotted():
            figure = Figure()
            axis = figure.subplots()
            axis.plot([1, 2], [1, 10], label="a line")
            axis.set(yscale="log", xlabel="x", title="title")
            axis.grid()
            axis.legend()
        (tmp_path / name).mkdir()
        write_svg(figure, tmp_path / name / "figure.svg")
        written.append((tmp_path / name / "figure.svg").read_text())
    assert written[0] == written[1] and "<text" not in written[0] and "line" in written[0]
    assert colours(written[0]) == {INK, COLOURS[0]}


def colours(svg):
    """The colours of an SVG; black is the default of what has no style, and matplotlib styles all that it plots."""
    return set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r'(?:xlink:)?href="[^"]*"|id="[^"]*"|url\([^)]*\)', "", svg)))


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.name)
def test_the_figures_of_the_docs_have_these_colours_only(path):
    assert colours(path.read_text()) <= {INK, GRAY, *COLOURS}


def test_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"figure.png: figures are written as SVG, so give a name that ends in .svg"):
        write_svg(Figure(), tmp_path / "figure.png")
