"""Takes the screenshot of a report in docs/images, from the ``output_dir`` of the README's first run:

PYTHONPATH=. .venv/bin/python tests/report_screenshot.py student
"""

from __future__ import annotations

import sys
from pathlib import Path

from browser import opened

IMAGE = Path(__file__).parent.parent / "docs" / "images" / "report.png"


def main() -> None:
    """Takes a screenshot of the upper part: advice and curves."""
    path = Path(sys.argv[1]) / "report" / "report.html"
    with opened(path, viewport={"width": 1000, "height": 1030}, color_scheme="light") as page:
        page.screenshot(path=IMAGE)


if __name__ == "__main__":
    main()
