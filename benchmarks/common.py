"""Command line, heading, tables and records of the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import torch

# Printed above the tables that have both methods.
EXACT_NOTE = "exact: the library's own exact loss; exact (materialised): the loss by autograd, exact in earlier tables"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--json`` that prints a script's docstring as it is written."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="file to write the records to")
    return made


def machine() -> str:
    """Cores, threads and versions, for the first line of the output."""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{threads}, torch {torch.__version__}, Python {platform.python_version()}"


def row(*cells: object) -> str:
    """One line of a Markdown table; None is an empty cell."""
    return f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |"


def header(*names: str) -> str:
    """The first two lines of a Markdown table."""
    return f"{row(*names)}\n{'|---' * len(names)}|"


def write(records: list[dict], path: Path | None) -> None:
    """Writes the records as JSON, if ``--json`` was given."""
    if path is not None:
        path.write_text(json.dumps(records, indent=1) + "\n")
