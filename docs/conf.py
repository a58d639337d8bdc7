"""Sphinx builds these pages with it: `make docs`."""

from __future__ import annotations

from importlib.metadata import version as version_of

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "labkeeper"
copyright = "2026, the labkeeper authors"  # noqa: A001 - Sphinx's name
author = "the labkeeper authors"
version = release = version_of("labkeeper")

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
nitpicky = True

html_theme = "furo"
html_title = "labkeeper"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["drawings.css"]


def setup(app: Sphinx) -> None:
    # Diagrams stay text here; other viewers of Markdown draw them.
    app.add_lexer("mermaid", TextLexer)
