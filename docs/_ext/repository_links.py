"""Sphinx extension: warn of broken relative links in the Markdown files beside docs/, such as README.md."""

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
    """The relative links of a Markdown file that lead nowhere: (line, what is missing)."""
    found = []
    for number, line in _prose(path):
        for target in LINK.findall(line):
            if SCHEME.match(target):
                continue
            name, _, heading = target.partition("#")
            other = path.parent / name if name else path
            if not other.exists():
                found.append((number, f"link to a missing file: {target}"))
            elif heading and heading not in _headings(other):
                found.append((number, f"link to a missing heading: {target}"))
    return found


def _prose(path: Path) -> list[tuple[int, str]]:
    """Lines outside of fenced code, with their numbers."""
    lines, fenced = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append((number, line))
    return lines


def _headings(path: Path) -> set[str]:
    """The anchors of a file's headings, as code hosts and MyST make them."""
    titles = (line.lstrip("#").strip().lower() for _, line in _prose(path) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}
