"""Pages of the site that lie outside docs/, and links that work in the repository and on the site alike.

mkdocs calls the functions; ``hooks`` in mkdocs.yml names this file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# The page of the site for each file of the repository outside docs/; a notebook is a download.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "examples/quickstart.ipynb": "quickstart.ipynb",
}
LINK = re.compile(r"\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links to files of the repository as links between pages."""
    name = page.file.src_uri
    source = {there: here for here, there in PAGES.items()}.get(name, f"docs/{name}")
    return relinked(markdown, source, name)


def relinked(markdown: str, source: str, page: str) -> str:
    """Rewrites the links and the images of a page.

    A link to a file that the site does not have, such as a script, becomes its text.

    Args:
        markdown: the page.
        source: its path in the repository.
        page: its path on the site.
    """

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/"):
            there = path.removeprefix("docs/")
        elif path in PAGES:
            there = PAGES[path]
        elif (ROOT / path).exists():
            return text
        else:
            return match[0]  # the strict build reports the link
        return f"[{text}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, markdown)
