"""``hf-dis report``: the page of one run, or of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_dis.commands.parsing import CommandParser
from hf_dis.report.command import make_report

DESCRIPTION = "Make the page of one run, or of several runs side by side, from their records."


@dataclass
class ReportArguments:
    """Arguments of ``hf-dis report`` beside the runs."""

    output_file: str | None = field(
        default=None,
        metadata={
            "help": "File of the page; by default beside the records of one run, or report.html for several runs."
        },
    )


def run(argv: Sequence[str]) -> None:
    """Makes the page and prints its file.

    Args:
        argv: the words after ``hf-dis report``.

    Raises:
        DataError: as :func:`hf_dis.report.command.make_report`.
    """
    parser = CommandParser(ReportArguments, "hf-dis report", DESCRIPTION)
    parser.add_argument("runs", nargs="+", help="output_dir of a training with DISReportCallback.")
    arguments, namespace = parser.parse(argv)
    print(make_report(namespace.runs, arguments.output_file))
