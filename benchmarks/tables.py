"""Writes the tables of the pages again, from the records in benchmarks/results.

    python benchmarks/tables.py          # writes the pages
    python benchmarks/tables.py --check  # names the pages whose tables differ, and fails if there is one

A table is found in its page by its first line, which the script of the records prints.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import error_time
import items
import large_vocabulary
import on_policy
import paper_cifar
import parity
import sharded_head
from common import read

ROOT = Path(__file__).parent.parent


class Table(NamedTuple):
    """A table of a page.

    Attributes:
        page: of the documentation.
        records: the name of their file in benchmarks/results.
        show: prints the table of the records.
    """

    page: str
    records: str
    show: Callable[[list[dict]], None]


TABLES = (
    Table("optimizer.md", "parity.jsonl", parity.print_table),
    Table("how-it-works.md", "layouts.jsonl", parity.print_table),
    Table("choosing-k.md", "gradient_error.jsonl", parity.print_table),
    Table("choosing-k.md", "probes.jsonl", parity.print_errors),
    Table("choosing-k.md", "error_time.jsonl", error_time.print_table),
    Table("items.md", "items.jsonl", items.print_table),
    Table("language-models.md", "large_vocabulary.jsonl", large_vocabulary.print_table),
    Table("benchmarks.md", "paper_cifar.jsonl", paper_cifar.print_table),
    Table("distributed.md", "sharded_head.jsonl", sharded_head.print_table),
    Table("divergences.md", "on_policy.jsonl", on_policy.print_table),
    Table("divergences.md", "on_policy.jsonl", on_policy.print_best),
)


def printed(table: Table, folder: Path) -> str:
    """The lines that the script prints for the records of a folder.

    Args:
        table: of a page.
        folder: with the records.
    """
    text = io.StringIO()
    with redirect_stdout(text):
        table.show(read(folder / table.records))
    return text.getvalue()


def replaced(page: str, table: str) -> str:
    """The page with its table of the same first line replaced.

    Args:
        page: the text of a page.
        table: lines of Markdown, each ended.

    Raises:
        ValueError: if the page does not have that first line once.
    """
    lines, new = page.splitlines(keepends=True), table.splitlines(keepends=True)
    if lines.count(new[0]) != 1:
        raise ValueError(f"a page has the line {new[0].strip()!r} {lines.count(new[0])} times: a table needs it once")
    start = end = lines.index(new[0])
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "".join([*lines[:start], *new, *lines[end:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for table in TABLES:
        path = ROOT / "docs" / table.page
        before = path.read_text()
        after = replaced(before, printed(table, ROOT / "benchmarks/results"))
        if after != before:
            stale.append(table.page)
            if not check:
                path.write_text(after)
    print("\n".join(stale) or "every table is that of its records")
    if check and stale:
        raise SystemExit("run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
