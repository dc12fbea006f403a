"""Messages of errors: a finding, and after it the expectation or the remedy."""

import ast
from pathlib import Path

import pytest

import hf_dis

PACKAGE = Path(hf_dis.__file__).parent
# Starts of causes that a message with the remedy has in it; X is a value.
CAUSES = (
    "X edges do not fit",
    "X items of X examples are not",
    "an array ",
    "it alters",
    "it claims",
    "it has more than",
    "it holds",
    "it refers to",
    "it unfolds",
    "its columns are",
    "some of its values",
    "the fact X is",
)


def raised(path):
    """Line and text of the messages that a file raises; the texts that a function makes are left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = node.exc.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            if all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
                yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "X" for part in parts)


def incomplete(path):
    """The messages without a second part, which follows a colon, a semicolon or a full stop."""
    return [
        f"{path.name}:{line}: {text}"
        for line, text in raised(path)
        if not any(mark in text for mark in (": ", "; ", ". ")) and not text.startswith(CAUSES)
    ]


def test_messages_have_an_expectation_or_a_remedy():
    files = sorted(PACKAGE.rglob("*.py"))
    assert sum(len(list(raised(file))) for file in files) > 250
    assert [line for file in files for line in incomplete(file)] == []


@pytest.mark.parametrize("message", ['"K is 0"', 'f"{name} is {value!r} and that is wrong"'])
def test_a_finding_alone_is_found(tmp_path, message):
    (tmp_path / "module.py").write_text(f"raise ValueError({message})\n")
    assert len(incomplete(tmp_path / "module.py")) == 1
    (tmp_path / "module.py").write_text(f"raise ValueError({message} ': it has to be 1 or more')\n")
    assert incomplete(tmp_path / "module.py") == []
