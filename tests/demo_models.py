"""A tiny teacher and student with a few characters, saved as ``make demo`` saves them."""

from __future__ import annotations

from pathlib import Path

import glyph_task
import torch
from PIL import Image, ImageDraw, ImageFont
from tiny_models import llama, spread_out

NAMES = [f"U+{code:04X}" for code in range(ord("A"), ord("A") + 60)]


def write_glyphs(folder: Path, num_examples: int = 3) -> Path:
    """Writes models that are not trained, of 60 classes, and images of the first classes."""
    for name, sizes, seed in (("teacher", [32, 64], 0), ("dis", [16, 32], 1)):
        model = spread_out(glyph_task.build_model(len(NAMES), sizes, seed), 30)
        glyph_task.name_classes(model, NAMES)
        model.save_pretrained(folder / name)
    (folder / "examples").mkdir()
    font = ImageFont.load_default(23)
    for number, name in enumerate(NAMES[:num_examples]):
        image = Image.new("L", (32, 32))
        ImageDraw.Draw(image).text((16, 16), chr(int(name[2:], 16)), 255, font, anchor="mm")
        image.save(folder / "examples" / f"{number:02}-{name}.png")
    return folder


def write_texts(folder: Path) -> Path:
    """Writes models that are not trained, and a tokenizer, as ``examples/run_clm.py`` saves them."""
    import clm_task
    from datasets import Dataset

    torch.manual_seed(0)
    tokenizer = clm_task.train_tokenizer(Dataset.from_dict({"text": ["import numpy as np"]}), 300)
    llama(len(tokenizer), seed=1, spread=30).save_pretrained(folder / "_teacher")
    llama(len(tokenizer), spread=30).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
