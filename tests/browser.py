"""A headless Chromium for tests of pages, and pages that tell what went wrong on them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """Starts Chromium; without it the test is skipped, but fails where the environment variable CI is set.

    Yields:
        the browser, an object of playwright.
    """
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        message = "no Chromium on the PATH: install it, on Debian by `apt-get install chromium`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visited(browser: Any, address: str, allowed: str | tuple[str, ...], **options: Any) -> Iterator[Any]:
    """Opens an address; fails if the page logs an error, raises one, or asks for an address that is not allowed.

    Args:
        browser: of :func:`chromium`.
        address: of the page.
        allowed: the start, or several, of every address that the page may ask for.
        **options: of playwright's ``new_page``.

    Yields:
        the page, an object of playwright.
    """
    page, wrong = browser.new_page(**options), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(allowed) else wrong.append(request.url))
    try:
        page.goto(address)
        yield page
        assert wrong == []
    finally:
        page.close()


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """Opens a file in Chromium, a page that asks for nothing else; see :func:`visited`."""
    address = path.resolve().as_uri()
    with chromium() as browser, visited(browser, address, address, **options) as page:
        yield page


@contextmanager
def browsed(address: str, **options: Any) -> Iterator[Any]:
    """Opens a page of a server in Chromium, which may ask that server for anything; see :func:`visited`.

    Args:
        address: of the page, with a slash after the server.
        **options: of playwright's ``new_page``.

    Yields:
        the page, an object of playwright.
    """
    allowed = address, "data:", "blob:"
    with chromium() as browser, visited(browser, address, allowed, **options) as page:
        yield page
