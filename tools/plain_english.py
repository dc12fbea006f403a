"""Checks that pages, docstrings, comments and messages are written in plain English.

Sentences are short, and the words of ``words.txt`` are not used. Run by ``make lint``:

    python tools/plain_english.py
"""

# Vale would be the usual tool. Its packages on PyPI (vale 3.25) and npm (@vvago/vale 3.23) hold no binary. They
# download it later, which fails where only package registries are reachable. proselint 0.16 has no word list and no
# limit of sentence length. The libraries sentencex and markdown-it-py split the text here.

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencex
from prose_texts import Text, texts_of

ROOT = Path(__file__).parent.parent
LONGEST = 30
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    ".github/**/*.md",
    "demo/*.md",
    "docs/**/*.md",
    "examples/*.md",
    "examples/*.ipynb",
    "hf_dis/**/*.md",
    "hf_dis/**/*.html",
]
CODE = ["hf_dis/**/*.py", "demo/*.py", "docs/*.py", "examples/*.py", "benchmarks/*.py", "tools/*.py"]
# Docstrings and comments are read there, strings are not.
TESTS = ["tests/**/*.py"]
# A dash between two words stands for a missing sentence. "s - p" and "(sampled - exact)" are differences.
DASH = re.compile(r"(?<![\w(])\w{2,},? (?:-|–|—) \w{2,}|\w—\w")
# A heading of the changelog below which entries stay as they were published.
RELEASED = re.compile(r"^## \[?\d", re.MULTILINE)


def word_list() -> list[tuple[re.Pattern, str]]:
    """Patterns of ``words.txt`` with their remedies."""
    lines = (Path(__file__).parent / "words.txt").read_text().splitlines()
    pairs = [line.split(" -> ") for line in lines if line and not line.startswith("#")]
    return [(re.compile(rf"(?<![\w-])(?:{pattern})(?![\w-])", re.IGNORECASE), remedy) for pattern, remedy in pairs]


def findings(text: Text, words: list[tuple[re.Pattern, str]]) -> Iterator[str]:
    """Complaints about a text, each with what was found and the remedy."""
    # A symbol such as K at the end of a sentence is not the initial of a name.
    parts = re.split(r"(?<=(?<![\w.])[A-Z]\.)\s+(?=[A-Z])", text.content)
    for sentence in (sentence for part in parts for sentence in sentencex.segment("en", part)):
        count = len(re.findall(r"\S*\w\S*", sentence))
        if count > LONGEST:
            yield f"a sentence of {count} words, at most {LONGEST}: {sentence.strip()}"
    for pattern, remedy in words:
        for match in pattern.finditer(text.content):
            yield f"'{match[0]}': write {remedy}"
    for match in DASH.finditer(text.content):
        yield f"'{match[0]}': a comma, a colon or a new sentence in place of the dash"
    if text.kind == "docstring start" and re.match(r"(what|whether|how)\b", text.content, re.IGNORECASE):
        yield f"'{text.content[:40]}': start with a verb or a noun"


def texts(root: Path) -> Iterator[Text]:
    """Every text of the project at a folder."""
    for pattern in [*PAGES, *CODE, *TESTS]:
        for path in sorted(root.glob(pattern)):
            yield from texts_of(path, messages=pattern not in TESTS)
    changelog = root / "CHANGELOG.md"
    if changelog.is_file():
        released = RELEASED.search(changelog.read_text())
        last = changelog.read_text().count("\n", 0, released.start()) if released else sys.maxsize
        yield from (text for text in texts_of(changelog, messages=False) if text.line <= last)


def main(root: Path = ROOT) -> int:
    """Prints the findings of a folder and returns their number."""
    words = word_list()
    found = 0
    for text in texts(root):
        for complaint in findings(text, words):
            print(f"{text.path.relative_to(root)}:{text.line}: {text.kind.split()[0]}: {complaint}")
            found += 1
    return found


if __name__ == "__main__":
    count = main()
    sys.exit(f"{count} findings: reword them as stated; tools/words.txt has the word list" if count else 0)
