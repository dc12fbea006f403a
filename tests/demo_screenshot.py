"""Takes the screenshots of the demo in docs/images, with the models of ``make demo``:

PYTHONPATH=. .venv/bin/python tests/demo_screenshot.py runs/glyphs
"""

from __future__ import annotations

import sys
from pathlib import Path

from browser import browsed
from demo_server import served

IMAGES = Path(__file__).parent.parent / "docs" / "images"
# The example that is chosen: R, the third of EXAMPLES in examples/run_glyphs.py.
CHOSEN = 2


def main() -> None:
    """Takes a screenshot of a wide window and one of a phone."""
    with served("--folder", sys.argv[1]) as address:
        for name, width in (("demo.png", 1100), ("demo_phone.png", 390)):
            with browsed(address, viewport={"width": width, "height": 900}) as page:
                page.locator("#examples button img").nth(CHOSEN).click()
                page.get_by_role("heading", name="Student").wait_for(timeout=120_000)
                page.wait_for_timeout(1000)  # until the lines of progress have faded
                page.screenshot(path=IMAGES / name, full_page=True)


if __name__ == "__main__":
    main()
