"""A headless Chromium for tests of pages, and pages that tell what went wrong on them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """Opens a file in Chromium; fails if the page logs an error, raises one, or asks for another address.

    Without Chromium the test is skipped, but fails where the environment variable CI is set.

    Args:
        path: of the page.
        **options: of playwright's ``new_page``.

    Yields:
        the page, an object of playwright.
    """
    address = path.resolve().as_uri()
    with _browsed(address, lambda asked: asked == address, options) as page:
        yield page


@contextmanager
def visited(address: str, **options: Any) -> Iterator[Any]:
    """Opens a page of a server as :func:`opened` opens a file; the page may ask its own server for anything.

    Args:
        address: of the page, with a slash after the server.
        **options: of playwright's ``new_page``.

    Yields:
        the page, an object of playwright.
    """
    with _browsed(address, lambda asked: asked.startswith((address, "data:", "blob:")), options) as page:
        yield page


@contextmanager
def _browsed(address: str, is_allowed: Callable[[str], bool], options: dict[str, Any]) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        message = "no Chromium on the PATH: install it, on Debian by `apt-get install chromium`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page, wrong = browser.new_page(**options), []
            page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: None if is_allowed(request.url) else wrong.append(request.url))
            page.goto(address)
            yield page
            assert wrong == []
        finally:
            browser.close()
