"""The figures of a report that a model card shows, as PNG beside the report; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hf_dis.report.advice import Log
from hf_dis.report.figures import Series, save_curves
from hf_dis.report.page import PANELS, points
from hf_dis.report.records import FOLDER, Run

# The panels of a card in order of preference: the first two that have values.
PREFERRED, NUMBER = ("KL to the teacher", "Gradient error", "Training loss", "Gradient direction"), 2


class CardFigure(NamedTuple):
    """A figure of a model card.

    Attributes:
        title: of the figure.
        text: tells the reader what to look for.
        file: of the PNG, relative to the folder of the card.
    """

    title: str
    text: str
    file: str


def save_card_figures(folder: Path, logs: Sequence[Log]) -> list[CardFigure]:
    """Plots the figures of a model card into the folder of the report.

    Args:
        folder: of the card.
        logs: of the training, as in ``state.log_history``.

    Returns:
        the figures, two at most; none where nothing was logged.
    """
    run, found = Run("", logs=list(logs)), []
    panels = {panel.title: panel for panel in PANELS}
    for panel in (panels[title] for title in PREFERRED):
        curves = {name: values for name in panel.names if (values := points(run, name))}
        if curves and len(found) < NUMBER:
            file = f"{FOLDER}/{panel.title.lower().replace(' ', '-')}.png"
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            series = [Series(name, values, number) for number, (name, values) in enumerate(curves.items())]
            save_curves(folder / file, series, panel.level)
            found.append(CardFigure(panel.title, panel.text, file))
    return found
