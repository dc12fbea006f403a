"""The entry point of ``hf-dis``: finds the command, and turns errors of its input into one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_dis.commands import cache, estimate, report
from hf_dis.version import __version__

COMMANDS = {"estimate": estimate, "cache": cache, "report": report}


def usage() -> str:
    """The commands, each with the first line of its help."""
    lines = ["usage: hf-dis COMMAND ...", ""]
    lines += [f"  {name:10}{command.DESCRIPTION}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "hf-dis COMMAND --help lists the arguments of a command."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the words after ``hf-dis``. None: those of the process.

    Returns:
        the exit code: 0; 2 if the input cannot be used, then stderr has one line with the cause; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--version"], ["--help"], ["-h"]):
        print(__version__ if words[0] == "--version" else usage())
        return 0
    if not words or words[0] not in COMMANDS:
        found = f"{words[0]!r} is not a command" if words else "no command is given"
        print(f"hf-dis: error: {found}: it has to be one of {', '.join(COMMANDS)}; see hf-dis --help", file=sys.stderr)
        return 2
    try:
        COMMANDS[words[0]].run(words[1:])
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        print(f"hf-dis {words[0]}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"hf-dis {words[0]}: stopped; give the command again, a cache continues where it stopped", file=sys.stderr
        )
        return 130
    return 0
