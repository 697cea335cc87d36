"""Configure Sphinx. `make docs` builds the documentation, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

import sslrun  # noqa: E402 (the package of this tree, found through sys.path)

project = "sslrun"
author = copyright = "The sslrun authors"
release = version = sslrun.__version__

extensions = ["myst_parser", "reference", "repository_links"]
exclude_patterns = ["_ext", "examples", "generated/*.md"]  # generated pages are included in others
nitpicky = True
smartquotes = False  # smart quotes would turn the -- of --from into a dash
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

html_theme = "furo"
html_title = f"sslrun {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
