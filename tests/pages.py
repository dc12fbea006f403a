"""The Python blocks of the documentation, and running them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block whose first line starts with this does not stand by itself.
FRAGMENT = "# fragment"


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The runnable ```python blocks of a page: line number of the first line, and code."""
    text = page.read_text()
    blocks = [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]
    return [(line, code) for line, code in blocks if not code.startswith(FRAGMENT)]


def run_page(page: Path, namespace: dict) -> dict:
    """Runs a page's blocks in order in one namespace; an error's traceback has the page's name and lines."""
    namespace.setdefault("__name__", page.stem)
    for line, code in python_blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    return namespace
