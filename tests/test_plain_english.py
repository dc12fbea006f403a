"""tools/plain_english.py: long sentences, listed words and dashes are found where people read text, and only there."""

import pytest
from plain_english import LONGEST, main, word_list

LONG = " ".join(["word"] * (LONGEST + 1)) + "."
SHORT = " ".join(["word"] * LONGEST) + "."


@pytest.fixture
def found(tmp_path, capsys):
    """Writes a file and returns the lines that the linter prints about it."""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        number = main(tmp_path)
        lines = capsys.readouterr().out.splitlines()
        assert number == len(lines)
        path.unlink()
        return lines

    return write


def test_a_long_sentence_of_a_page_is_found_with_its_place(found):
    (line,) = found("docs/page.md", f"# Title\n\n{SHORT} {LONG}\n\n{SHORT}\n")
    assert line.startswith(f"docs/page.md:3: page: a sentence of {LONGEST + 1} words, at most {LONGEST}: word word")


@pytest.mark.parametrize(
    "page",
    [f"- {SHORT}\n- {SHORT}\n", f"| a | b |\n|---|---|\n| {SHORT} | {SHORT} |\n", f"## {SHORT}\n\n{SHORT}\n"],
    ids=["list", "table", "heading"],
)
def test_items_cells_and_headings_are_texts_of_their_own(found, page):
    assert not found("docs/page.md", page)
    assert found("docs/page.md", page.replace(SHORT, LONG, 1))


@pytest.mark.parametrize(
    "text",
    [
        "A `data set` here.",
        "```\nthe data set - and others\n```",
        "    python data set\n",
        "![the data set](x.png)",
        "s - p",
    ],
)
def test_code_pictures_and_differences_are_not_prose(found, text):
    assert not found("docs/page.md", text + "\n")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Two Data sets.", "Data sets"),
        ("It fails without a word.", "without a word"),
        ("Classes are drawn.", "drawn"),
        ("It draws classes.", "draws"),
        ("That cannot be had.", "cannot be had"),
        ("The message says what to do.", "says what to do"),
        ("It takes 5 ms a step.", "ms a step"),
        ("1,000 logits a row.", "logits a row"),
        ("Some bytes an item.", "bytes an item"),
        ("One class and the others.", "others"),
        ("One thing - another thing.", "thing - another"),
        ("One thing – another thing.", "thing – another"),
        ("One thing—another thing.", "g—a"),
        ("The gain is worth its noise.", "worth its"),
    ],
)
def test_listed_words_and_dashes_of_a_page_are_found(found, text, word):
    (line,) = found("docs/page.md", text + "\n")
    assert line.startswith(f"docs/page.md:1: page: '{word}': ")


def test_each_listed_word_has_a_remedy():
    assert len(word_list()) > 20 and all(remedy.strip() for _, remedy in word_list())


@pytest.mark.parametrize(
    "folder", ["hf_dis", "demo", "docs", "examples", "benchmarks", "tools", "tests", "tests/cache"]
)
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ('"""A data set."""\n', "docstring"),
        ('def f():\n    """Reads.\n\n    Args:\n        path: of the data set.\n    """\n', "docstring"),
        ('class A:\n    """Reads.\n\n    - the data set;\n    """\n', "docstring"),
        ("x = 1  # a data set\n", "comment"),
        ("# Some\n# data\n# set\n", "comment"),
        (f'"""{LONG}"""\n', "docstring"),
        (f'def f():\n    """Reads.\n\n    Returns:\n        {SHORT[:-1]}\n        word.\n    """\n', "docstring"),
    ],
)
def test_docstrings_and_comments_are_read(found, folder, code, kind):
    (line,) = found(f"{folder}/module.py", code)
    assert f": {kind}: " in line


@pytest.mark.parametrize(
    "code",
    [
        'raise ValueError("the data set is empty: give another")\n',
        'raise ValueError(f"the data "\n    f"set {x} is empty: give another")\n',
        'warnings.warn("the data set is empty")\n',
        'logger.warning("the data set %s is empty", x)\n',
        'x: int = field(default=1, metadata={"help": "Size of the data set."})\n',
        'MESSAGE = "the data set is empty"\n',
        'PART = f\'<p id="a">the data <b class="{x}">set</b> of {y}</p> is empty\'\n',
    ],
)
@pytest.mark.parametrize("folder", ["hf_dis", "demo", "examples"])
def test_errors_warnings_logs_and_help_are_read(found, folder, code):
    (line,) = found(f"{folder}/module.py", code)
    assert line.startswith(f"{folder}/module.py:1: message: 'data set': write dataset")


def test_strings_of_tests_are_not_messages(found):
    assert not found("tests/test_module.py", 'x = "the data set is empty"\n')


def test_short_strings_and_values_are_not_messages(found):
    assert not found("hf_dis/module.py", 'x = {"data set": f"{data_set!r}", "drawn": "a - b"}\n')


@pytest.mark.parametrize("word", ["What", "Whether", "how"])
def test_a_docstring_starts_with_a_verb_or_a_noun(found, word):
    (line,) = found("hf_dis/module.py", f'def f():\n    """{word} it is.\n\n    What follows is prose.\n    """\n')
    assert line.endswith("start with a verb or a noun")


def test_entries_of_a_docstring_and_lines_of_its_tables_are_texts_of_their_own(found):
    half = " ".join(["word"] * (LONGEST - 5))
    entries = f"    Args:\n        one: {half}\n        two, three: {half}\n            {half[:20]}\n"
    assert not found("hf_dis/module.py", f'def f():\n    """Reads.\n\n{entries}    """\n')
    assert not found("benchmarks/module.py", f'"""Methods:\n\none  {half}\nthe other  {half}\n"""\n')


def test_released_entries_of_the_changelog_stay_as_they_are(found):
    text = "# Changelog\n\n## [Unreleased]\n\n- A thing.\n\n## [0.1.0] - 2026-12-01\n\n- A data set.\n"
    assert not found("CHANGELOG.md", text)
    assert found("CHANGELOG.md", text.replace("A thing", "A data set"))


def test_prose_and_comments_of_a_notebook_are_read(found):
    cells = '[{"cell_type": "markdown", "source": ["A data set."]}, {"cell_type": "code", "source": ["# data set"]}]'
    page, comment = found("examples/notebook.ipynb", f'{{"cells": {cells}}}')
    assert ": page: 'data set'" in page and ": comment: 'data set'" in comment


TEMPLATE = """<style>
data set {}</style><p>{% if x %}
A <b>data</b> set of {{ data set }}.</p>
<script>'data set'</script>"""


def test_a_template_is_read_without_its_code(found):
    (line,) = found("hf_dis/report/page.html", TEMPLATE)
    assert line.startswith("hf_dis/report/page.html:3: page: 'data set'")
    table = f"<table><tr><td>{SHORT[:-1]}</td><td>{SHORT}</td></tr></table>"
    assert not found("hf_dis/report/page.html", table)
    assert len(found("hf_dis/report/page.html", table.replace(SHORT, LONG))) == 1


@pytest.mark.parametrize(
    "page", ["README.md", ".github/ISSUE_TEMPLATE/bug.md", "demo/README.md", "docs/reference/page.md"]
)
def test_pages_of_every_folder_are_read(found, page):
    assert len(found(page, "A data set.\n")) == 1
