"""The documentation's Python blocks, shell commands and links, and running or checking them."""

from __future__ import annotations

import ast
import re
import shlex
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [ROOT / "examples" / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
# A block after the comment <!-- skip: next "reason" --> is not run.
BLOCKS = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])


def python_blocks(page: Path) -> list[str]:
    """The code of the ```python blocks of a page, skipped ones included."""
    return [example.parsed for example in BLOCKS.parse(page) if isinstance(example.parsed, str)]


def skips(page: Path) -> list[tuple[str, str | None]]:
    """The action and the reason of each directive of a page that skips blocks."""
    return [example.parsed for example in BLOCKS.parse(page) if not isinstance(example.parsed, str)]


def run_page(page: Path, namespace: dict) -> dict:
    """Runs a page's blocks in order in one namespace; an error's traceback has the page's name and lines.

    Args:
        page: the Markdown file.
        namespace: names that the page takes as given.

    Returns:
        the namespace, with the names that the page defines.
    """
    document = BLOCKS.parse(page)
    document.namespace |= {"__name__": page.stem, **namespace}
    for example in document:
        with suppress(SkipTest):
            example.evaluate()
    return document.namespace


def commands(page: Path) -> list[list[str]]:
    """The shell commands of a page, or of a script's docstring.

    They are indented by four spaces, continued after a backslash, or in a block that is not Python.
    """
    text = page.read_text()
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    text = re.sub(r"^```(?:python|bibtex)\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\\\n *", " ", text)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)", text, re.MULTILINE)
    lines = "\n".join([*fenced, *indented]).splitlines()
    inline = [code for code in re.findall(r"`([^`\n]+)`", text) if code.startswith(("python ", "accelerate "))]
    # A line that is a comment as a whole has no words.
    return [words for line in [*lines, *inline] if (words := shlex.split(line, comments=True))]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)}


def links(page: Path) -> list[str]:
    """The targets of a page's relative links and images."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in found if not target.startswith(("http://", "https://"))]


def reference() -> list[str]:
    """The names that the pages of the reference document."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
