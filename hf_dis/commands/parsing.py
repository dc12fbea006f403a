"""Arguments of a command from flags and from a file; flags have priority."""

from __future__ import annotations

import json
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_dis.errors import DataError


class _Help(ArgumentDefaultsHelpFormatter):
    """Help with the defaults; an argument whose default is None says in words what that means, or is required."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class CommandParser(HfArgumentParser):
    """An ``HfArgumentParser`` whose errors are one line on stderr and exit code 2.

    Args:
        kind: the dataclass of the arguments.
        prog: name of the command.
        description: of the command.
    """

    def __init__(self, kind: type, prog: str, description: str | None = None):
        super().__init__(kind, prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
        self.kind = kind
        self.add_argument("--config", help="A YAML or JSON file of arguments; flags have priority over the file.")

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def parse(self, argv: Sequence[str]) -> tuple[Any, Any]:
        """The arguments, and a namespace of those that are not of the dataclass.

        Args:
            argv: the words after the name of the command.

        Raises:
            DataError: if the file cannot be read, or names an argument that does not exist.
        """
        words = list(argv)
        for place, word in enumerate(words):
            if word.partition("=")[0] == "--config" and (word != "--config" or place + 1 < len(words)):
                words = self._of_file(Path(word.partition("=")[2] or words[place + 1])) + words
                break
        namespace = self.parse_args(words)
        names = {one.name for one in fields(self.kind)}
        given = {name: value for name, value in vars(namespace).items() if name in names}
        return self.kind(**given), namespace

    def _of_file(self, path: Path) -> list[str]:
        """The arguments of a file as words of a command."""
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(
                f"--config {path} cannot be read as YAML or JSON: {error}; give a file of names and values"
            ) from error
        if not isinstance(values, dict):
            raise DataError(f"--config {path} holds a {type(values).__name__}: it has to hold names and values")
        known = {one.name for one in fields(self.kind)}
        if unknown := sorted(set(map(str, values)) - known):
            raise DataError(
                f"--config {path} has arguments that do not exist: {', '.join(unknown)}; known are "
                f"{', '.join(sorted(known))}"
            )
        words = []
        for name, value in values.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words
