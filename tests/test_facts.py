"""Facts that more than one file has to state: all of them state the same."""

import configparser
import re
from pathlib import Path

from hf_dis.version import __version__

ROOT = Path(__file__).parent.parent


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def found(pattern, file):
    """The only match of a pattern in a file."""
    (match,) = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    return match


def test_the_citation_has_version_and_licence_of_the_package():
    assert found(r"^version: (.*)$", "CITATION.cff") == __version__
    assert found(r"^license: (.*)$", "CITATION.cff") == setup_cfg()["metadata"]["license"]


def test_tools_check_the_oldest_python_of_the_package():
    oldest = setup_cfg()["options"]["python_requires"].removeprefix(">=")
    assert found(r'^target-version = "py(\d+)"$', "pyproject.toml") == oldest.replace(".", "")
    assert f"hf_dis needs Python {oldest} or newer" in (ROOT / "Makefile").read_text()


def test_the_paper_is_one_paper():
    address = found(r"^    url: https://arxiv.org/abs/(.*)$", "CITATION.cff")
    for file in ("docs/how-it-works.md", "hf_dis/__init__.py", "hf_dis/trainer/model_card_template.md"):
        assert address in (ROOT / file).read_text(), file


def test_versions_of_the_packages_are_in_setup_cfg_alone():
    """pyproject.toml has the build's and the tools' settings, no facts about the package."""
    text = (ROOT / "pyproject.toml").read_text()
    assert "[project]" not in text and "dependencies" not in text


def test_adapters_and_pages_name_the_lowest_trl_of_the_extra():
    lowest = setup_cfg()["options.extras_require"]["trl"].strip().removeprefix("trl>=")
    for file in ("gkd.py", "on_policy.py", "trl.py"):
        assert found(r'^require\("trl", "(.*)"\)', f"hf_dis/integrations/{file}") == lowest, file
    assert f"TRL {lowest} or newer" in (ROOT / "docs" / "trl.md").read_text()


def test_reliability_names_the_lowest_versions_of_the_package():
    required = setup_cfg()["options"]["install_requires"].split()
    lowest = dict(requirement.split(">=") for requirement in required)
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert f"{lowest['transformers']} with {lowest['accelerate']} is the lowest tried pair" in page


def test_contributing_has_a_place_for_every_module_and_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    modules = [path for path in (ROOT / "hf_dis").iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"]
    names = [f"hf_dis/{path.name}{'/' * path.is_dir()}" for path in modules if path.name != "version.py"]
    folders = [f"{name}/" for name in ("benchmarks", "demo", "docs", "examples", "tests", "tools")]
    assert len(names) > 20 and [name for name in [*names, *folders] if f"`{name}`" not in text] == []


def test_the_changelog_keeps_its_form():
    """Keep a Changelog 1.1.0: versions from the newest on, each with kinds of changes in their order."""
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert versions[0].startswith("[Unreleased]\n")
    assert all(re.match(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}\n", version) for version in versions[1:])
    for version in versions:
        found = re.findall(r"^### (.*)$", version, re.MULTILINE)
        assert found == [kind for kind in kinds if kind in found]
