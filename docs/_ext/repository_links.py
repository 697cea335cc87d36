"""Sphinx extension: warn of broken relative links in Markdown files outside docs/.

Those files, such as README.md, are not part of the site, so Sphinx does not check them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _check)
    return {"version": "1", "parallel_read_safe": True}


def _check(app: Sphinx) -> None:
    for path in sorted(Path(app.srcdir).parent.glob("*.md")):
        for line, message in broken_links(path):
            logger.warning(message, location=f"{path}:{line}")


def broken_links(path: Path) -> list[tuple[int, str]]:
    """List the broken relative links of a Markdown file: (line, what is missing)."""
    broken = []
    for number, line in _prose(path):
        for target in LINK.findall(line):
            if SCHEME.match(target):  # a link to another site
                continue
            name, _, heading = target.partition("#")
            other = path.parent / name if name else path
            if not other.exists():
                broken.append((number, f"link to a missing file: {target}"))
            elif heading and heading not in _headings(other):
                broken.append((number, f"link to a missing heading: {target}"))
    return broken


def _prose(path: Path) -> list[tuple[int, str]]:
    """List the lines outside fenced code, with their numbers."""
    lines, fenced = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append((number, line))
    return lines


def _headings(path: Path) -> set[str]:
    """Return the anchors of a file's headings, as code hosts and MyST make them."""
    titles = (line.lstrip("#").strip().lower() for _, line in _prose(path) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}
