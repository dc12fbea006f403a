"""benchmarks/fsdp_head.py: the table of the docs."""

import fsdp_head
from pages import ROOT


def test_the_table_of_the_docs_is_that_of_the_script(capsys):
    fsdp_head.print_table()
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "distributed.md").read_text()


def test_only_the_gathered_head_grows_with_the_classes():
    few, many = (
        fsdp_head.megabytes(fsdp_head.SETTINGS[1]._replace(num_classes=number), 8) for number in (10**6, 10**7)
    )
    assert many["gathered"] == 10 * few["gathered"]
    assert (many["rows"], many["features"]) == (few["rows"], few["features"])
