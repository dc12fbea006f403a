"""The documentation site, published as a version by mike, in a headless Chromium."""

import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from browser import chromium, visited
from pages import ROOT, reference

pytestmark = pytest.mark.slow
PHONE = {"viewport": {"width": 390, "height": 844}}


def run(*command, cwd):
    """Runs a command with the programs of this environment: mike starts mkdocs."""
    git = {f"GIT_{who}_{what}": "docs@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=cwd, env=os.environ | git | path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a site with the version 1.0, which is also the latest."""
    pytest.importorskip("mike")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("docs", "examples", "hf_dis"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [ROOT / "mkdocs.yml", *ROOT.glob("*.md")]:
        shutil.copy(path, source)
    run("git", "init", "--quiet", cwd=source)
    run("git", "commit", "--quiet", "--allow-empty", "--message", "Start", cwd=source)  # mike names its commit
    mike = shutil.which("mike", path=Path(sys.executable).parent)
    run(mike, "deploy", "--branch", "pages", "--update-aliases", "1.0", "latest", cwd=source)
    run("git", f"--work-tree={site}", "checkout", "--quiet", "pages", "--", ".", cwd=source)
    return site


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(folder):
    """The address of the latest version on a local server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/latest/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def visit(browser, address):
    """Opens a page of the latest version; it may ask for files of the site only."""

    def visit(name, **options):
        return visited(browser, address + name, address.removesuffix("latest/"), **options)

    return visit


def test_every_page_opens_without_errors_fits_a_phone_and_shows_its_figures(folder, visit):
    latest = folder / "latest"
    names = sorted(str(path.relative_to(latest)) for path in latest.rglob("*.html") if path.name != "404.html")
    assert {"index.html", "settings.html", "examples.html", "changelog.html", "reference/engine.html"} <= set(names)
    figures, wrong = 0, []
    for name in names:
        with visit(name, **PHONE) as page:
            page.wait_for_selector(".md-version", state="attached")  # the list of versions has been read
            width = page.evaluate("document.documentElement.scrollWidth")
            shown = page.evaluate("[...document.querySelectorAll('article img')].map(img => img.naturalWidth)")
        figures += len(shown)
        wrong += [(name, width, shown)] if width != 390 or 0 in shown else []
    assert wrong == [] and figures >= 6


def test_every_name_of_the_reference_has_an_anchor(folder):
    text = "".join(path.read_text() for path in (folder / "latest" / "reference").glob("*.html"))
    assert [name for name in reference() if f'id="{name}"' not in text] == []


def test_search_finds_a_class(visit):
    with visit("index.html") as page:
        page.keyboard.press("/")
        page.keyboard.type("DISConfig")
        link = page.locator(".md-search-result__link[href*='reference/configuration.html']").first
        link.wait_for()
        link.click()
        page.wait_for_url("**/reference/configuration.html*")
        assert page.locator("[id='hf_dis.DISConfig']").count() == 1


COLOURS = """[document.body.dataset.mdColorScheme, getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector("article p")).color]"""


def test_the_switch_changes_between_light_and_dark_and_is_remembered(visit):
    with visit("index.html", color_scheme="light") as page:
        light = page.evaluate(COLOURS)
        page.locator("label[title='Dark mode']").click()
        dark = page.evaluate(COLOURS)
        assert (light[0], dark[0]) == ("default", "slate") and all(map(str.__ne__, light, dark))
        page.goto(page.url.replace("index", "settings"))
        assert page.evaluate(COLOURS) == dark
        page.locator("label[title='Light mode']").click()
        assert page.evaluate(COLOURS) == light


def test_the_site_follows_the_system(visit):
    for scheme, expected in (("light", "default"), ("dark", "slate")):
        with visit("index.html", color_scheme=scheme) as page:
            assert page.evaluate(COLOURS)[0] == expected


def test_the_versions_can_be_chosen(visit):
    with visit("index.html") as page:
        link = page.locator(".md-version__link").first
        link.wait_for(state="attached")
        assert link.text_content().strip() == "1.0" and link.get_attribute("href").endswith("/1.0/")
