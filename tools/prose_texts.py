"""Texts that people read, taken from Markdown pages, notebooks, templates of HTML and Python files.

Code is left out: a code span, or a value of an f-string or a template, becomes the word ``Code``.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

CODE = "Code"
# A string of at least this many words is a message or a help text.
MESSAGE_WORDS = 4
# Comments that tools read.
DIRECTIVES = ("noqa", "type:", "fmt:", "pragma", "fragment", "!")
# A heading of a docstring's section, such as "Args:".
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Source|Example|Examples|Note):")
# Tags that are inside a sentence, and tags whose content is not text.
INLINE, NOT_TEXT = {"a", "b", "code", "em", "i", "output", "span", "strong"}, {"script", "style"}
# The names of arguments or errors in a section; outside, the mark of a list item or the first column of a table.
NAMES = re.compile(r"\*{0,2}\w+(?:, \*{0,2}\w+)*(?: \([^)]*\))?: ")
LISTED = re.compile(r"[-*] |\S+(?: \S+)* {2,}")


@dataclass(frozen=True)
class Text:
    """A paragraph: file, number of its first line, kind ("page", "docstring", "comment" or "message") and content."""

    path: Path
    line: int
    kind: str
    content: str


def texts_of(path: Path, messages: bool) -> list[Text]:
    """Texts of a file in the order of its lines.

    Args:
        path: a file that ends with .md, .ipynb, .html or .py.
        messages: includes the strings of a Python file.
    """
    if path.suffix == ".md":
        return list(page_texts(path, path.read_text()))
    if path.suffix == ".ipynb":
        readers = {"markdown": page_texts, "code": partial(code_texts, messages=messages)}
        cells = json.loads(path.read_text())["cells"]
        return [text for cell in cells for text in readers[cell["cell_type"]](path, "".join(cell["source"]))]
    if path.suffix == ".html":
        return Template(path).texts
    return code_texts(path, path.read_text(), messages)


def code_texts(path: Path, source: str, messages: bool) -> list[Text]:
    """Docstrings and comments of Python code, and its strings where ``messages`` is true."""
    tree = ast.parse(source)
    found = [*docstrings(path, tree), *comments(path, source)]
    if messages:
        found += strings(path, tree)
    return sorted(found, key=lambda text: text.line)


def page_texts(path: Path, source: str) -> Iterator[Text]:
    """Paragraphs, headings, list items and table cells of Markdown."""
    line = 1
    for token in MarkdownIt("commonmark").enable("table").parse(re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL)):
        if token.map:  # a table's cells have no lines of their own
            line = token.map[0] + 1
        if token.type == "inline":
            yield Text(path, line, "page", _plain(token.children or []))


def _plain(tokens: list[Token]) -> str:
    """The words that a reader sees."""
    shown = {"code_inline": CODE, "softbreak": " ", "hardbreak": " "}
    return "".join(
        shown.get(token.type, token.content) for token in tokens if token.type not in ("image", "html_inline")
    )


class Template(HTMLParser):
    """Reads the texts of a template of Jinja: the content of each element that is not inside a sentence.

    Args:
        path: of the template.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.texts: list[Text] = []
        self._path, self._collected, self._is_text = path, "", True
        source = re.sub(r"{%.*?%}", "", path.read_text())
        self.feed(re.sub(r"{{.*?}}", CODE, source))
        self._end()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Ends the text before a tag."""
        if tag not in INLINE:
            self._end()
        self._is_text = tag not in NOT_TEXT

    def handle_endtag(self, tag: str) -> None:
        """Ends the text of an element."""
        if tag not in INLINE:
            self._end()
        self._is_text = True

    def handle_data(self, data: str) -> None:
        """Collects a text."""
        if self._is_text:
            self._collected += data

    def _end(self) -> None:
        if text := " ".join(self._collected.split()):
            self.texts.append(Text(self._path, self.getpos()[0], "page", text))
        self._collected = ""


def docstrings(path: Path, tree: ast.Module) -> Iterator[Text]:
    """Paragraphs of the docstrings; the first of each is of the kind "docstring start"."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        content = ast.get_docstring(node)
        if content:
            first = node.body[0].lineno
            for index, (line, paragraph) in enumerate(paragraphs(content)):
                yield Text(path, first + line, "docstring" if index else "docstring start", paragraph)


def paragraphs(docstring: str) -> Iterator[tuple[int, str]]:
    """The paragraphs of a docstring with the number of their first line, counted from 0.

    An entry of a section is a paragraph without its name, and so is a line of a table, "name  text". An indented line
    outside a section is a command or code.
    """
    collected: list[str] = []
    start, section, base = 0, False, 0
    for number, line in enumerate([*docstring.splitlines(), ""]):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        heading = SECTION.fullmatch(text) is not None
        entry = (NAMES if section and indent == base else LISTED).match(text)
        if collected and (not text or heading or entry):
            yield start, _spans(" ".join(collected))
            collected = []
        if heading or (section and text and indent < base):
            section, base = heading, indent + 4
        if text and not heading and (section or not indent or collected):
            start = start if collected else number
            collected.append(text[entry.end() :] if entry else text)


def comments(path: Path, source: str) -> Iterator[Text]:
    """Comments; those on neighbouring lines are one text."""
    lines: list[tuple[int, int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        content = token.string.lstrip("# ").rstrip()
        if token.type == tokenize.COMMENT and content and not content.startswith(DIRECTIVES):
            lines.append((*token.start, content))
    start = 0
    for index, (line, column, _) in enumerate(lines, 1):
        if index == len(lines) or lines[index][:2] != (line + 1, column):
            yield Text(
                path, lines[start][0], "comment", _spans(" ".join(content for *_, content in lines[start:index]))
            )
            start = index


def strings(path: Path, tree: ast.Module) -> Iterator[Text]:
    """Strings that are not docstrings, values of f-strings replaced."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        whole = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and id(node) not in inner)
        if not whole or id(node) in skipped:
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        content = "".join(
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else CODE for part in parts
        )
        for paragraph in re.split(r"\n+", re.sub(r"</?[a-z][^<>]*>", " ", content)):
            if len(re.findall(r"[^\W\d_]{2,}", paragraph)) >= MESSAGE_WORDS:
                yield Text(path, node.lineno, "message", _spans(" ".join(paragraph.split())))


def _spans(text: str) -> str:
    """Code spans of a docstring, comment or message replaced."""
    return re.sub(r"``.+?``|`.+?`", CODE, text)
