"""A newcomer's first hour: the wheel, the README's programs in an empty folder, the report, and plain transformers."""

import re
import sys
from pathlib import Path

import pytest
from browser import opened
from built import build, install, run

ROOT = Path(__file__).parent.parent
MARK = '<!-- skip: next "tests/test_first_hour.py runs this program" -->'
# Lines of the package's loggers name it: "hf_dis.build WARNING ...".
NAMED = "import logging; logging.basicConfig(format='%(name)s %(levelname)s %(message)s')\n"
OURS = re.compile(r"site/hf_dis/\S*: \w*Warning|\bhf_dis[.\w]* (?:WARNING|ERROR)\b")
# The programs take about three minutes on two idle cores.
TIMEOUT = 600


def complete_programs():
    """The README's blocks that are programs of their own."""
    pattern = rf"^{re.escape(MARK)}\n\n```python\n(.*?)^```"
    return re.findall(pattern, (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_has_a_training_and_a_use_of_the_student():
    training, use = complete_programs()
    assert "DISDistillationTrainer(" in training and "hf_dis" not in use
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_path_of_the_readme(tmp_path):
    site, home = tmp_path / "site", tmp_path / "home"
    home.mkdir()
    install(build(tmp_path / "dist")["wheel"], site)
    training, use = complete_programs()
    environment = {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    shown = run(sys.executable, "-c", NAMED + training, cwd=home, timeout=TIMEOUT, **environment)
    assert [line for line in shown.stderr.splitlines() if OURS.search(line)] == []
    with opened(home / "student" / "report" / "report.html", viewport={"width": 390, "height": 800}) as page:
        titles = page.locator("h3").all_text_contents()
        assert {"Training loss", "KL to the teacher", "Gradient error"} <= set(titles)
    shown = run(sys.executable, "-c", use, cwd=home)  # transformers alone: hf_dis is not on the path
    assert shown.stdout.split()[0] == "3375"
