"""A page that shows distillation by sampled classes on a character that you sketch, or on a text that you type.

    python demo/app.py [--folder runs/glyphs] [--text_folder runs/clm]

`make demo` trains the models of the first tab. Nothing is loaded from the network.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import numpy as np
import views
from answers import MAKE_TEXT, Budget, Glyphs, Item, Texts, drawn, measure
from PIL import Image
from transformers import HfArgumentParser

TITLE = "Distillation by sampled classes"
ABOUT = (
    "A teacher trains a student, which computes a few sampled classes of each item in place of all classes. "
    "The gradient then has an error. A larger budget costs more and has a smaller error."
)
# Budgets of the curve, and of the slider.
BUDGETS, LARGEST, FIRST = (8, 16, 32, 64, 128, 256, 512, 1024), 1024, 128
CANVAS, BRUSH = 320, 15
Models = Glyphs | Texts


@dataclass
class DemoArguments:
    """Arguments of the demo."""

    folder: str = field(default="runs/glyphs", metadata={"help": "Folder that `make demo` filled."})
    text_folder: str | None = field(default=None, metadata={"help": "output_dir of examples/run_clm.py."})
    port: int = field(default=7860, metadata={"help": "Port of the page on this machine."})


@dataclass
class Asked:
    """An item on the page.

    Attributes:
        item: one item.
        fitting: items that the proposal is fitted to.
        budgets: of the curve.
    """

    item: Item
    fitting: Item
    budgets: list[Budget]


def ask(models: Models, item: Item, fitting: Item) -> Asked:
    """Measures the budgets of the curve for an item.

    Args:
        models: the teacher and its student.
        item: one item.
        fitting: items that the proposal is fitted to.
    """
    sizes = [size for size in BUDGETS if size <= item.teacher.shape[1]]
    return Asked(item, fitting, [measure(models.student, item, fitting, size) for size in sizes])


def shown(models: Models, asked: Asked | None, num_sampled: float) -> list[str]:
    """The four parts of the page for an item: answers, sampled classes, cost, and the curve.

    Args:
        models: the teacher and its student.
        asked: the item; None before there is one.
        num_sampled: K.
    """
    if asked is None:
        return ["", "", "", ""]
    num_classes = asked.item.teacher.shape[1]
    budget = measure(models.student, asked.item, asked.fitting, int(num_sampled))
    return [
        views.answers(asked.item, budget, models.label),
        views.lights(budget, num_classes, models.label),
        views.costs(budget, num_classes),
        views.curve(asked.budgets, budget),
    ]


def ask_drawing(glyphs: Glyphs, drawing: dict[str, Any] | None) -> Asked:
    """Asks for a sketch.

    Args:
        glyphs: the models.
        drawing: of the sketchpad, whose layers have ink in their alpha channel.

    Raises:
        gradio.Error: if the sketch is empty.
    """
    layers = [np.asarray(layer)[..., 3] for layer in (drawing or {}).get("layers", [])]
    try:
        image = drawn(np.max(layers, 0) if layers else np.zeros((CANVAS, CANVAS), np.uint8))
    except ValueError as error:
        raise gr.Error(str(error)) from error
    return ask(glyphs, glyphs.ask(image), glyphs.asked)


def ask_example(glyphs: Glyphs, event: gr.SelectData) -> Asked:
    """Asks for the example that was chosen in the gallery."""
    image = np.asarray(Image.open(glyphs.examples[event.index]).convert("L"))
    return ask(glyphs, glyphs.ask(image), glyphs.asked)


def ask_text(texts: Texts, text: str) -> Asked:
    """Asks for the token that follows a text.

    Raises:
        gradio.Error: if the text is empty.
    """
    try:
        items = texts.ask(text)
    except ValueError as error:
        raise gr.Error(str(error)) from error
    return ask(texts, items.last(), items)


def outputs(models: Models, largest: int) -> tuple[gr.State, Callable[..., None]]:
    """Adds the slider and the four parts of the page.

    Args:
        models: the teacher and its student.
        largest: budget of the slider.

    Returns:
        the item on the page, and a function that connects an event to it: of the event, the function that asks, and
        its inputs.
    """
    asked = gr.State(None)
    budget = gr.Slider(1, largest, min(FIRST, largest), step=1, label="Budget: sampled classes", elem_id="budget")
    with gr.Row():
        with gr.Column(min_width=260):
            cost = gr.HTML()
        with gr.Column(min_width=260):
            curve = gr.HTML()
    answers, lights = gr.HTML(), gr.HTML()
    parts = [answers, lights, cost, curve]
    show = partial(shown, models)
    budget.change(show, [asked, budget], parts, show_progress="hidden", trigger_mode="always_last")

    def connect(event: Callable[..., Any], function: Callable[..., Asked], inputs: list[Any] | None) -> None:
        event(function, inputs, asked).success(show, [asked, budget], parts)

    return asked, connect


def glyph_tab(glyphs: Glyphs) -> None:
    """Adds the tab of characters.

    Args:
        glyphs: the models.
    """
    with gr.Row():
        with gr.Column(min_width=260):
            pad = gr.Sketchpad(
                label="Draw a character",
                type="numpy",
                image_mode="RGBA",
                canvas_size=(CANVAS, CANVAS),
                brush=gr.Brush(default_size=BRUSH, colors=["#000000"], color_mode="fixed"),
                layers=False,
                placeholder="Choose the brush, then draw a large character",
            )
            button = gr.Button("Ask teacher and student", variant="primary")
        with gr.Column(min_width=260):
            gr.Markdown("Or choose an example")
            files = [str(path) for path in glyphs.examples]
            gallery = gr.Gallery(
                files, show_label=False, columns=4, height=320, allow_preview=False, buttons=[], elem_id="examples"
            )
    _, connect = outputs(glyphs, min(LARGEST, len(glyphs.names)))
    connect(button.click, partial(ask_drawing, glyphs), [pad])

    def chosen(event: gr.SelectData) -> Asked:  # gradio reads the annotation, which a partial function hides
        return ask_example(glyphs, event)

    connect(gallery.select, chosen, None)


def text_tab(texts: Texts | None) -> None:
    """Adds the tab of texts, or the way to get one.

    Args:
        texts: the models; None without them.
    """
    if texts is None:
        gr.Markdown(
            f"There is no student of text yet. Train one, then start the demo with it:\n\n    {MAKE_TEXT}\n"
            "    python demo/app.py --text_folder runs/clm"
        )
        return
    text = gr.Textbox("import numpy as", label="Type a text; the models answer with its next token", lines=2)
    button = gr.Button("Ask teacher and student", variant="primary")
    _, connect = outputs(texts, LARGEST)
    connect(button.click, partial(ask_text, texts), [text])


def build(glyphs: Glyphs, texts: Texts | None = None) -> gr.Blocks:
    """Makes the page.

    Args:
        glyphs: the models of characters.
        texts: the models of text, if there are any.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n{ABOUT}")
        with gr.Tab("Draw a character"):
            glyph_tab(glyphs)
        with gr.Tab("Type a text"):
            text_tab(texts)
    return page


def look() -> dict[str, Any]:
    """Keywords of ``launch`` for the look of the page: fonts of the system, and the styles of the parts."""
    fonts, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return {"theme": gr.themes.Default(font=fonts, font_mono=mono), "css": views.STYLE}


def main() -> None:
    """Loads the models and serves the page."""
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    try:
        glyphs = Glyphs.load(Path(arguments.folder))
        texts = None if arguments.text_folder is None else Texts.load(Path(arguments.text_folder))
    except FileNotFoundError as error:
        sys.exit(f"demo: error: {error}")
    build(glyphs, texts).launch(
        server_port=arguments.port, allowed_paths=[arguments.folder], ssr_mode=False, footer_links=["gradio"], **look()
    )


if __name__ == "__main__":
    main()
