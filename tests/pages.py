"""The documentation's Python blocks, shell commands and links, and running or checking them."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PAGES = [ROOT / "examples" / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
# A block whose first line starts with this mark does not run by itself.
FRAGMENT = "# fragment"


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The ```python blocks of a page that run: line number of the first line, and code."""
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
        exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), namespace)
    return namespace


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
    return [shlex.split(line, comments=True) for line in [*lines, *inline] if re.match(r"[\w=./ ]*\S", line)]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)}


def links(page: Path) -> list[str]:
    """The targets of a page's relative links and images."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in found if not target.startswith(("http://", "https://"))]


def tables(page: Path) -> dict[str, list[str]]:
    """By heading, the names in the first column of the tables below it."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip("`")
        elif match := re.match(r"\| `([^`]+)` \|", line):
            found.setdefault(heading, []).append(match[1])
    return found
