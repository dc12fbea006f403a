"""benchmarks/tables.py: the tables of the pages are those of the records, and a page that differs is named."""

import sys

import pytest
import tables


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["tables.py", *flags])
    tables.main()


def test_the_pages_have_the_tables_of_the_records(monkeypatch, capsys):
    run(monkeypatch, "--check")
    assert capsys.readouterr().out == "every table is that of its records\n"
    assert {table.records for table in tables.TABLES} == {
        path.name for path in (tables.ROOT / "benchmarks/results").glob("*.jsonl")
    }


def test_a_page_that_differs_is_named_and_written_anew(monkeypatch, tmp_path, capsys):
    page = tmp_path / "docs/page.md"
    for path in (page, tmp_path / "benchmarks/results/a.jsonl"):
        path.parent.mkdir(parents=True)
    page.write_text("Before\n\n| a |\n|---|\n| 1 |\n| 2 |\n\nAfter\n")
    (tmp_path / "benchmarks/results/a.jsonl").write_text('{"a": 3}\n')

    def show(records):
        print("| a |\n|---|", *(f"| {one['a']} |" for one in records), sep="\n")

    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TABLES", (tables.Table("page.md", "a.jsonl", show),))
    with pytest.raises(SystemExit, match=r"run python benchmarks/tables\.py"):
        run(monkeypatch, "--check")
    assert capsys.readouterr().out == "page.md\n" and "| 2 |" in page.read_text()
    run(monkeypatch)
    assert page.read_text() == "Before\n\n| a |\n|---|\n| 3 |\n\nAfter\n"
    run(monkeypatch, "--check")


@pytest.mark.parametrize("page", ["", "| a |\n|---|\n\n| a |\n|---|\n"])
def test_a_page_needs_the_first_line_once(page):
    with pytest.raises(ValueError, match=f"'| a |' {page.count('a')} times"):
        tables.replaced(page, "| a |\n|---|\n| 1 |\n")
