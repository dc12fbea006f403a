"""docs/reliability.md and docs/distributed.md name tests that exist and are run."""

import re

import pytest
from pages import ROOT

PAGES = [ROOT / "docs" / "reliability.md", ROOT / "docs" / "distributed.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page):
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", page.read_text()))
    assert len(named) >= 4
    for name in named:
        assert "def test_" in (ROOT / name).read_text(), name


def test_every_promise_names_its_test():
    items = re.findall(r"^\| (.+) \| (.+) \|$", PAGES[0].read_text(), re.MULTILINE)
    promises = [item for item in items if item[0] != "promise"]
    assert len(promises) > 15
    for promise, kept_by in promises:
        assert re.search(r"`(tests/\w|make )", kept_by), promise


def test_what_make_runs():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([\w-]+)`", PAGES[0].read_text()))
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for name in re.findall(r"tests/\S+", makefile.split("OLDEST_TESTS :=")[1].split(".PHONY")[0]):
        assert (ROOT / name).exists(), name
